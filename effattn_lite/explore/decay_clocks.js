// Heads as clocks: a fact is written once, then every head forgets it at its own speed.

function decayOf(schedule, head, heads, gamma) {
  if (schedule === "retnet") return 1 - 2 ** (-5 - head);
  if (schedule === "printed") return Math.exp((-8 * (head + 1)) / heads);
  if (schedule === "released") return Math.exp(-(2 ** ((-8 * (head + 1)) / heads)));
  return gamma;
}

const halfLife = (gamma) => Math.LN2 / -Math.log(gamma);

// signal over noise of a fact of that age, as a fraction of what the best single decay would give
function fraction(gamma, age) {
  return Math.sqrt((1 - gamma * gamma) * (age + 1)) * Math.exp(age * (Math.log(gamma) + Math.log1p(1 / age) / 2));
}

function bestSignal(age, K, M) {
  return Math.sqrt((K * M) / (age + 1)) * Math.exp((-age * Math.log1p(1 / age)) / 2);
}

function percent(x) {
  if (x > 0.9995 && x < 1) return "> 99.9 %";
  if (x > 0.9945 && x < 1) return `${(100 * x).toFixed(1)} %`;
  if (x >= 0.0995) return `${(100 * x).toFixed(0)} %`;
  if (x >= 0.00001) return `${formatNumber(100 * x, 2)} %`;
  return x > 0 ? "< 0.001 %" : "0 %";
}

const tokens = (x) => (x < 9.5 ? formatNumber(x, 2) : formatNumber(Math.round(x), 6));

function sector(x, y, r, share, fill) {
  if (share > 0.999) return svgElement("circle", { cx: x, cy: y, r, fill });
  const a = 2 * Math.PI * share, large = share > 0.5 ? 1 : 0;
  const end = `${(x + r * Math.sin(a)).toFixed(2)} ${(y - r * Math.cos(a)).toFixed(2)}`;
  return svgElement("path", { d: `M${x} ${y}V${y - r}A${r} ${r} 0 ${large} 1 ${end}Z`, fill });
}

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), ages = stage.get("ages"), last = ages[ages.length - 1];
    const blue = familyColor("fixed decay"), loud = color("second");

    const clocks = () => {
      const { schedule, heads, gamma, age, noise, K, M } =
        Object.fromEntries(["schedule", "heads", "gamma", "age", "noise", "K", "M"].map((key) => [key, stage.get(key)]));
      const all = Array.from({ length: heads }, (_, h) => {
        const decay = decayOf(schedule, h, heads, gamma), near = fraction(decay, age);
        return { h, decay, life: halfLife(decay), left: decay ** age, near, signal: near * bestSignal(age, K, M) };
      });
      const best = all.reduce((a, b) => (b.near > a.near ? b : a));
      return { all, best, age, noise };
    };

    stage.slider("age", { label: "tokens since the fact", values: ages, format: (x) => formatNumber(x, 6) });
    let timer = null;
    const stop = () => { clearInterval(timer); timer = null; play.textContent = "Let tokens pass"; };
    const play = stage.button({
      label: "Let tokens pass",
      press: () => {
        if (timer) { stop(); return; }
        if (stage.get("age") === last) stage.set({ age: ages[0] });
        play.textContent = "Pause";
        timer = setInterval(() => {
          const next = nearestOf(ages, stage.get("age")) + 1;
          if (next < ages.length) stage.set({ age: ages[next] });
          if (next >= ages.length - 1) stop();
        }, 120);
      },
    });
    stage.undo.push(() => clearInterval(timer));
    stage.select("schedule", { label: "decays", options: stage.get("schedules") });
    stage.select("heads", { label: "heads", options: [1, 2, 4, 8] });
    stage.slider("gamma", { label: "one decay for all heads", values: stage.get("gammas"), format: (x) => String(x) });
    const share = () => model.set("schedule", "shared");
    model.on("change:gamma", share);
    stage.undo.push(() => model.off("change:gamma", share));
    stage.toggle("noise", { label: "against the noise of other facts" });

    const columns = (width) => Math.min(stage.get("heads"), width < 560 ? 4 : 8);
    stage.plot({
      height: (width) => 118 * Math.ceil(stage.get("heads") / columns(width)),
      label: () => `${stage.get("heads")} clocks, one a head; the read-out below says what each keeps`,
      draw(layer, width) {
        const { all, best, noise } = clocks(), count = columns(width), cell = width / count, r = 27;
        for (const clock of all) {
          const x = cell * ((clock.h % count) + 0.5), y = 118 * Math.floor(clock.h / count) + r + 4;
          const share = Math.min(1, noise ? clock.near : clock.left), paint = clock === best ? loud : blue;
          layer.append(svgElement("circle", { cx: x, cy: y, r, fill: color("panel"), stroke: paint, "stroke-width": clock === best ? 3 : 1.5 }));
          if (share > 0.001) layer.append(sector(x, y, r - 3, share, paint));
          layer.append(
            svgText(x, y + r + 18, `head ${clock.h}`, { anchor: "middle", "font-weight": clock === best ? 700 : 400 }),
            svgText(x, y + r + 34, `½ in ${tokens(clock.life)}`, { anchor: "middle", class: "muted" }),
            svgText(x, y + r + 50, noise ? `S/N ${formatNumber(clock.signal, 2)}` : percent(clock.left), { anchor: "middle" }),
          );
        }
      },
    });

    const frame = (width) => logScale([1, last], [38, width - 30]);
    const nearest = (age) => ages.reduce((a, b) => (Math.abs(Math.log(b / age)) < Math.abs(Math.log(a / age)) ? b : a));
    stage.plot({
      height: 236,
      label: () => (stage.get("noise")
        ? "Signal over noise of each head against the age of the fact, as a fraction of the best possible at that age"
        : "Share of the fact that each head keeps, against the age of the fact"),
      draw(layer, width, height) {
        const { all, best, age, noise } = clocks(), bottom = height - 44;
        const x = frame(width), y = linearScale([0, 1], [bottom, 26]);
        layer.append(
          axis(x, { at: bottom, label: "tokens since the fact was written", ticks: [1, 10, 100, 1000, 10000], format: (v) => formatNumber(v, 6) }),
          axis(y, { side: "left", at: 38, label: noise ? "signal over noise, share of the best possible" : "share left", ticks: [0, 0.5, 1], grid: width - 68 }),
        );
        const grid = Array.from({ length: 161 }, (_, i) => last ** (i / 160));
        for (const clock of [...all].sort((a, b) => (a === best) - (b === best))) {
          const value = (d) => (noise ? fraction(clock.decay, d) : clock.decay ** d);
          layer.append(svgLine(grid.map((d) => [x(d), y(value(d))]), {
            stroke: clock === best ? loud : blue, "stroke-width": clock === best ? 3 : 1.5, "stroke-opacity": clock === best ? 1 : 0.75,
          }));
        }
        layer.append(svgElement("line", { x1: x(age), x2: x(age), y1: 26, y2: bottom, stroke: color("ink"), "stroke-dasharray": "4 3" }));
      },
      handles: [{
        label: "tokens since the fact",
        at: (width) => [frame(width)(stage.get("age")), 26],
        move: (px, py, width) => stage.set({ age: nearest(Math.max(1, frame(width).invert(px))) }),
        nudge: (dx, dy) => {
          const next = nearestOf(ages, stage.get("age")) + (dx || dy);
          if (next >= 0 && next < ages.length) stage.set({ age: ages[next] });
        },
        text: () => `${stage.get("age")} tokens`,
      }],
    });

    stage.readout(() => {
      const { all, best, age } = clocks(), first = all[0], end = all[all.length - 1];
      const keeps = (c, who) => `${who} (half-life ${tokens(c.life)} tokens) keeps ${percent(c.left)} of it`;
      const alike = first.decay === end.decay;
      const kept = alike ? keeps(first, all.length > 1 ? "every head" : "the head") : `${keeps(first, "head 0")}, ${keeps(end, `head ${end.h}`)}`;
      return `${formatNumber(age, 6)} ${age === 1 ? "token" : "tokens"} after the fact, ${kept}. ` +
        `${alike ? "Its" : `Clearest is head ${best.h}: its`} signal over noise is ${percent(best.near)} of the best possible at this age.`;
    });
    return stage.cleanup;
  },
};
