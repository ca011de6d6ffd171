// One mode of a state space model: its rate, the factor a token, the response; then steps that differ.

// complex numbers as [real, imaginary]
const times = ([a, b], [c, d]) => [a * c - b * d, a * d + b * c];
const over = ([a, b], [c, d]) => [(a * c + b * d) / (c * c + d * d), (b * c - a * d) / (c * c + d * d)];
const size = ([a, b]) => Math.hypot(a, b);

// the factor of one token, for a rate times a step
function factorOf(rule, [re, im]) {
  if (rule === "exact") return [Math.exp(re) * Math.cos(im), Math.exp(re) * Math.sin(im)];
  if (rule === "euler") return [1 + re, im];
  return over([1 + re / 2, im / 2], [1 - re / 2, -im / 2]);
}

function halves(r) {
  if (Math.abs(r - 1) < 1e-9) return "never fades";
  if (r > 1) return `doubles every ${formatNumber(Math.LN2 / Math.log(r), 2)} tokens: the response explodes`;
  return r < 1e-9 ? "is gone after one token" : `halves every ${formatNumber(Math.LN2 / -Math.log(r), 2)} tokens`;
}

const TURNS = [1, 0, 8];
const turnWords = { 1: "usual step", 0: "step 0, skipped", 8: "step times 8" };

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), teal = familyColor("state space"), loud = color("second");
    const lags = 60, text = stage.get("text");

    const now = () => {
      const { fade, ring, step, rule, turns } =
        Object.fromEntries(["fade", "ring", "step", "rule", "turns"].map((key) => [key, stage.get(key)]));
      const at = (turn) => factorOf(rule, [-fade * step * turn, ring * step * turn]);
      const factor = at(1), response = [[1, 0]];
      for (let l = 1; l <= lags; l++) response.push(times(response[l - 1], factor));
      // what is left of the first token: its size in the state, after each token
      const left = [1];
      for (let i = 1; i < text.length; i++) left.push(left[i - 1] * size(at(turns[i])));
      return { fade, ring, step, rule, turns, factor, response, left };
    };

    stage.select("rule", { label: "rule", options: stage.get("rules") });
    stage.slider("step", { label: "step Δ", values: stage.get("steps"), format: String });
    stage.slider("fade", { label: "fade", min: 0, max: 2, step: 0.05 });
    stage.slider("ring", { label: "ring", min: 0, max: 6, step: 0.1 });

    // two planes side by side; the rate's knob is in the left one
    const frames = (width) => {
      const gap = 26, tall = Math.min(210, (width - gap) / 2), w = tall * 0.78;
      const x0 = Math.max(30, width / 4 - w / 2 + 8), middle = (width * 3) / 4, r = tall / 2 - 14;
      return {
        bottom: tall + 26,
        re: linearScale([-2, 0], [x0, x0 + w]),
        im: linearScale([0, 6], [tall + 26, 36]),
        disc: { x: middle, y: tall / 2 + 28, r },
      };
    };
    const clamp = (x, high) => Math.min(high, Math.max(0, x));
    stage.plot({
      height: (width) => frames(width).bottom + 46,
      label: () => "Left, the rate in the complex plane; right, the factor a token beside the unit circle; the read-out below gives both",
      draw(layer, width) {
        const { fade, ring, factor, rule } = now(), f = frames(width), { x, y, r } = f.disc;
        layer.append(
          axis(f.re, { at: f.bottom, label: "real part: fade", ticks: [-2, -1, 0] }),
          axis(f.im, { side: "left", at: f.re(-2), ticks: [0, 2, 4, 6], grid: f.re(0) - f.re(-2) }),
          svgText(f.re(-2) + 6, f.im(6) + 16, "imaginary: ring", { class: "muted" }),
          svgText(f.re(-1), 18, "rate A, a unit of time", { anchor: "middle", "font-weight": 600 }),
          svgText(x, 18, "factor a token", { anchor: "middle", "font-weight": 600 }),
          svgElement("circle", { cx: x, cy: y, r, fill: color("panel"), stroke: color("muted") }),
          svgElement("line", { x1: x - r, x2: x + r, y1: y, y2: y, stroke: color("line") }),
          svgElement("line", { x1: x, x2: x, y1: y - r, y2: y + r, stroke: color("line") }),
          svgText(x, y + r + 18, "circle: size 1", { anchor: "middle", class: "muted" }),
        );
        // powers of the factor, as far as the drawing reaches
        const path = now().response.filter((z) => size(z) < 1.35).map(([a, b]) => [x + r * a, y - r * b]);
        layer.append(svgLine(path, { stroke: teal, "stroke-width": 1, "stroke-opacity": 0.55 }));
        for (const [px, py] of path) layer.append(svgElement("circle", { cx: px, cy: py, r: 2, fill: teal }));
        const big = size(factor), far = big > 1.25 ? 1.25 / big : 1;
        const [px, py] = [x + r * factor[0] * far, y - r * factor[1] * far];
        layer.append(
          svgElement("line", { x1: x, y1: y, x2: px, y2: py, stroke: big > 1 + 1e-9 ? color("wrong") : loud, "stroke-width": 2 }),
          svgElement("circle", { cx: px, cy: py, r: 6, fill: big > 1 + 1e-9 ? color("wrong") : loud }),
        );
        layer.append(svgLine([[f.re(-fade), f.im(0)], [f.re(-fade), f.im(ring)]], { stroke: loud, "stroke-dasharray": "3 3", "stroke-width": 1 }));
        if (rule === "euler" && big > 1 + 1e-9) layer.append(svgText(x, y + r + 34, "outside: it explodes", { anchor: "middle" }));
      },
      handles: [{
        label: "rate: left and right set the fading, up and down the ringing",
        at: (width) => { const f = frames(width), { fade, ring } = now(); return [f.re(-fade), f.im(ring)]; },
        move: (px, py, width) => {
          const f = frames(width);
          stage.set({
            fade: Math.round(clamp(-f.re.invert(px), 2) * 20) / 20,
            ring: Math.round(clamp(f.im.invert(py), 6) * 10) / 10,
          });
        },
        nudge: (dx, dy) => {
          const { fade, ring } = now();
          stage.set({ fade: clamp(Math.round((fade - 0.05 * dx) * 20) / 20, 2), ring: clamp(Math.round((ring + 0.1 * dy) * 10) / 10, 6) });
        },
        text: () => `${formatNumber(-now().fade)} + ${formatNumber(now().ring)} i`,
        fill: loud,
      }],
    });

    stage.plot({
      height: 206,
      label: () => "Weight of a token in the state, 0 to 60 tokens later: dots from the rule, the line exact",
      draw(layer, width, height) {
        const { fade, ring, step, response } = now(), bottom = height - 44;
        const x = linearScale([0, lags], [38, width - 20]), y = linearScale([-1, 1], [bottom, 30]);
        layer.append(
          axis(x, { at: bottom, label: "tokens since it was written", ticks: [0, 10, 20, 30, 40, 50, 60] }),
          axis(y, { side: "left", at: 38, label: "weight in the state; the line is the exact one", ticks: [-1, 0, 1], grid: width - 58 }),
        );
        const fine = Array.from({ length: 601 }, (_, i) => i / 10);
        const exact = fine.map((l) => [x(l), y(Math.exp(-fade * step * l) * Math.cos(ring * step * l))]);
        layer.append(svgLine(exact, { stroke: color("muted"), "stroke-width": 1 }));
        response.forEach(([a], l) => {
          if (Math.abs(a) <= 1.2) layer.append(svgElement("circle", { cx: x(l), cy: y(a), r: 3, fill: teal }));
        });
      },
    });

    stage.readout(() => {
      const { fade, ring, step, factor } = now(), r = size(factor), angle = Math.abs(Math.atan2(factor[1], factor[0]));
      const turn = angle > 1e-9 ? `and turns once every ${formatNumber((2 * Math.PI) / angle, 2)} tokens` : "and does not turn";
      return `The rate -${formatNumber(fade)} + ${formatNumber(ring)} i at step ${step} becomes a factor of size ` +
        `${formatNumber(r)}: a write ${halves(r)} ${turn}.`;
    });

    // the sentence: a button a token
    stage.append(htmlElement("p", {}, "Press a token to give it a step of 0, of 8 times Δ, or the usual one:"));
    const row = stage.append(htmlElement("div", { class: "explorable-controls" }));
    const buttons = text.slice(1).map((word, i) => htmlElement("button", {
      type: "button",
      click: () => {
        const turns = [...stage.get("turns")];
        turns[i + 1] = TURNS[(TURNS.indexOf(turns[i + 1]) + 1) % TURNS.length];
        stage.set({ turns });
      },
    }, word));
    row.append(...buttons);
    stage.draw(() => {
      const turns = stage.get("turns");
      buttons.forEach((node, i) => {
        node.textContent = turns[i + 1] === 1 ? text[i + 1] : `${text[i + 1]} ×${turns[i + 1]}`;
        node.setAttribute("aria-label", `token ${i + 2}, ${text[i + 1]}: ${turnWords[turns[i + 1]]}`);
        node.setAttribute("aria-pressed", turns[i + 1] !== 1);
      });
    });
    el.append(htmlElement("div", { class: "explorable-controls" }));
    const all = (choose) => stage.set({ turns: text.map((_, i) => choose(i)) });
    stage.button({ label: "All steps alike", press: () => all(() => 1) });
    stage.button({ label: "Skip the fillers", press: () => all((i) => (stage.get("fillers").includes(i) ? 0 : 1)) });
    stage.button({ label: "Wipe at the full stop", press: () => all((i) => (i === text.length - 1 ? 8 : stage.get("turns")[i])) });

    stage.plot({
      height: 190,
      label: () => `Share of the first token, ${text[0]}, left in the state after each of ${text.length} tokens; the read-out below gives the last`,
      draw(layer, width, height) {
        const { left, turns } = now(), bottom = height - 46, w = (width - 52) / text.length;
        const y = linearScale([0, 1], [bottom, 26]);
        layer.append(axis(y, { side: "left", at: 38, label: `left of "${text[0]}"`, ticks: [0, 0.5, 1], grid: width - 52 }));
        left.forEach((share, i) => {
          const x = 42 + w * i, top = y(Math.min(1, share));
          const fill = i && turns[i] === 0 ? color("muted") : share > 1 + 1e-9 ? color("wrong") : teal;
          layer.append(svgElement("rect", { x, y: top, width: Math.max(2, w - 4), height: Math.max(0, bottom - top), fill }));
          const words = svgText(x + w / 2 - 2, bottom + 16 + (width < 520 && i % 2 ? 15 : 0), text[i], { anchor: "middle" });
          layer.append(words);
        });
      },
    });
    stage.readout(() => {
      const { left, turns } = now(), last = left[left.length - 1], zero = turns.filter((t) => t === 0).length;
      const share = last > 1 + 1e-9 ? `${formatNumber(last, 2)} times` : `${formatNumber(100 * last, 2)} % of`;
      return `After "${text[text.length - 1]}" the state holds ${share} what "${text[0]}" wrote; ` +
        `${zero ? `${zero} of ${text.length - 1} tokens were skipped` : "no token was skipped"}.`;
    });
    return stage.cleanup;
  },
};
