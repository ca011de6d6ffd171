// One key of a Titans memory: its writes, the momentum that carries them on, and what the memory answers.

const LOW = -0.5, HIGH = 1.75;

// noise that is the same for everybody: sums of a few sines, between -0.5 and 0.5
const noiseAt = (t) => (Math.sin(12.9898 * t) + Math.sin(78.233 * t + 1) + Math.sin(37.719 * t + 2)) / 6;
const plain = (x, digits = 2) => (Math.abs(x) < 5e-4 ? "0" : formatNumber(x, digits)).replace("-", "−");

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), T = stage.get("tokens");
    const red = familyColor("online learning"), loud = color("second"), grey = color("muted");

    // a memory of one number under rate, momentum, forgetting and mini-batches
    const follow = (eta, mu, batch) => {
      const { stream, shock, cut, keep } = read();
      let m = 0, p = 0, start = 0;
      const writes = [], carried = [], held = [], told = [];
      for (let t = 1; t <= T; t++) {
        const seen = stream === "once" ? t === shock : true;
        const value = (t >= shock ? 1 : 0) + (stream === "noise" ? noiseAt(t) : 0);
        const write = seen ? eta * (value - start) : 0;
        p = (t === cut && cut < T ? 0 : mu) * p + write;
        m = keep * m + p;
        if (t % batch === 0) start = m;
        writes.push(write); carried.push(p); held.push(m); told.push(seen ? value : null);
      }
      return { writes, carried, held, told };
    };
    const read = () => Object.fromEntries(["stream", "eta", "mu", "keep", "batch", "shock", "cut"].map((key) => [key, stage.get(key)]));
    let state = null;
    stage.draw(() => {
      const now = read(), same = now.eta / (1 - now.mu);
      state = { ...now, same, own: follow(now.eta, now.mu, now.batch), bare: follow(now.eta, 0, now.batch), fast: follow(same, 0, now.batch) };
    });

    stage.select("stream", { label: "the text:", options: stage.get("streams") });
    stage.slider("eta", { label: "rate η", values: stage.get("rates"), format: (x) => String(x) });
    stage.slider("mu", { label: "momentum μ", min: 0, max: 0.98, step: 0.01, format: (x) => x.toFixed(2) });
    stage.slider("keep", { label: "memory kept a token", values: [0.9, 0.95, 0.98, 0.99, 0.995, 1], format: (x) => String(x) });
    stage.slider("batch", { label: "mini-batch, tokens", values: [1, 4, 8, 16], format: (x) => String(x) });

    const place = (width) => linearScale([1, T], [46, width - 14]);
    const clamp = (t, low, high) => Math.max(low, Math.min(high, Math.round(t)));
    const held = (x) => Math.max(LOW, Math.min(HIGH, x));
    const setShock = (t) => stage.set({ shock: clamp(t, 2, 60) });
    const setCut = (t) => stage.set({ cut: clamp(t, 3, T) });

    stage.plot({
      height: 206,
      label: () => "What each token writes, as bars, and the momentum, as a line; handles for the shock and for the token that cuts the momentum",
      draw(layer, width) {
        const { writes, carried } = state.own, x = place(width);
        const top = Math.max(1e-9, ...writes.map(Math.abs), ...carried.map(Math.abs));
        const limit = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5].find((l) => l >= top) ?? 5;
        const low = Math.min(...writes, ...carried) < -0.02 * limit, y = linearScale([low ? -limit : 0, limit], [148, 30]);
        layer.append(
          axis(y, { side: "left", at: 46, label: "bars: what a token writes; line: the momentum P", ticks: low ? [-limit, 0, limit] : [0, limit / 2, limit], format: plain, grid: width - 60 }),
          svgLine([[x(1), y(0)], [x(T), y(0)]], { stroke: color("line"), "stroke-width": 1 }),
        );
        const tall = (v) => Math.max(-limit, Math.min(limit, v));
        writes.forEach((w, i) => {
          if (Math.abs(w) > 1e-12) layer.append(svgLine([[x(i + 1), y(0)], [x(i + 1), y(tall(w))]], { stroke: loud, "stroke-width": 3 }));
        });
        layer.append(svgLine(carried.map((p, i) => [x(i + 1), y(tall(p))]), { stroke: red, "stroke-width": 2.5 }));
        const near = Math.abs(x(state.shock) - x(state.cut)) < 96;
        layer.append(
          svgText(x(state.shock), 196, "shock", { anchor: "middle", "font-weight": 600 }),
          svgText(Math.min(x(state.cut), width - 42), near ? 159 : 196, state.cut < T ? "momentum cut" : "no cut", { anchor: "middle", class: "muted" }),
        );
      },
      handles: [
        { label: "token of the shock", at: (width) => [place(width)(stage.get("shock")), 172], move: (px, _, width) => setShock(place(width).invert(px)), nudge: (dx, dy) => setShock(stage.get("shock") + (dx || dy)), text: () => `token ${stage.get("shock")}`, fill: loud },
        { label: "token that cuts the momentum", at: (width) => [place(width)(stage.get("cut")), 172], move: (px, _, width) => setCut(place(width).invert(px)), nudge: (dx, dy) => setCut(stage.get("cut") + (dx || dy)), text: () => (stage.get("cut") < T ? `token ${stage.get("cut")}` : "no cut"), fill: grey },
      ],
    });

    const level = linearScale([LOW, HIGH], [206, 40]);
    stage.plot({
      height: 266,
      label: () => "What the memory answers to the key after every token, with momentum, without it, and without it at a larger rate",
      draw(layer, width) {
        const x = place(width), line = (values, rest) => layer.append(svgLine(values.map((m, i) => [x(i + 1), level(held(m))]), rest));
        layer.append(
          axis(x, { at: 206, label: "token", ticks: [1, 24, 48, 72, 96] }),
          axis(level, { side: "left", at: 46, label: "", ticks: [-0.5, 0, 0.5, 1, 1.5], format: plain, grid: width - 60 }),
          svgText(0, 14, "what the memory answers to the key"),
        );
        state.own.told.forEach((v, i) => {
          if (v !== null) layer.append(svgElement("circle", { cx: x(i + 1), cy: level(held(v)), r: state.stream === "once" ? 5 : 2.5, fill: "none", stroke: color("ink"), "stroke-width": 1.2 }));
        });
        line(state.bare.held, { stroke: grey, "stroke-width": 2, "stroke-dasharray": "2 4" });
        line(state.fast.held, { stroke: grey, "stroke-width": 2, "stroke-dasharray": "8 4" });
        line(state.own.held, { stroke: red, "stroke-width": 3 });
        const narrow = width < 520;
        const items = [[narrow ? "momentum" : "with momentum", red, null], [narrow ? "none" : "without", grey, "2 4"], [narrow ? "none, rate η/(1−μ)" : "without, rate η/(1−μ)", grey, "8 4"]];
        let left = narrow ? 0 : 46;
        for (const [words, stroke, dash] of items) {
          layer.append(svgLine([[left, 256], [left + 24, 256]], { stroke, "stroke-width": 3, ...(dash ? { "stroke-dasharray": dash } : {}) }), svgText(left + 29, 260, words));
          left += 42 + words.length * (narrow ? 8.2 : 7.8);
        }
      },
    });

    stage.readout(() => {
      const { own, bare, fast, shock, cut, same, keep, stream, batch } = state, answers = own.held;
      const peak = answers.reduce((best, m, i) => (Math.abs(m) > Math.abs(answers[best]) + 1e-9 ? i : best), 0);
      const end = answers[T - 1], wild = Math.abs(answers[peak]) > 3;
      const start = `Token ${shock} brings the value 1${stream === "once" ? ", and the key never returns" : ", and so does every later token"}.`;
      const course = wild
        ? `The memory swings ever further: at token ${peak + 1} it answers ${plain(answers[peak], 3)}.`
        : `The memory answers ${plain(answers[shock - 1])} at once, ${plain(answers[peak])} at its peak (token ${peak + 1}) and ${plain(end)} at the end.`;
      const others = `Without momentum the end is ${plain(bare.held[T - 1])}; at the rate ${plain(same)} it is ${plain(fast.held[T - 1])}.`;
      const stop = cut < T ? ` At token ${cut} the momentum was cut.` : "";
      return `${start} ${course} ${others}${stop}${keep < 1 ? ` A token keeps ${plain(100 * keep, 3)} % of the memory.` : ""}${batch > 1 ? ` Errors are taken every ${batch} tokens.` : ""}`;
    });
    return stage.cleanup;
  },
};
