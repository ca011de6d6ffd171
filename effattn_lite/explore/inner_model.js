// An inner model of one number: a curve that is trained on the tokens it reads, a mini-batch at a time.

const TOP = 1.6, LOSS = 2;
const plainNumber = (x) => (Math.abs(x) < 5e-4 ? "0" : Math.abs(x) > 99 ? x.toExponential(0).replace("e+", "e") : formatNumber(x, 2)).replace("-", "−");

// gelu by tanh, and its derivative
function geluAt(x) {
  const c = Math.sqrt(2 / Math.PI), half = 0.5 + 0.5 * Math.tanh(c * x * (1 + 0.044715 * x * x));
  return [x * half, half + 2 * x * half * (1 - half) * c * (1 + 3 * 0.044715 * x * x)];
}

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), T = stage.get("places").length;
    const own = familyColor("online learning"), grey = color("muted"), dots = color("accent"), loud = color("second");
    const size = stage.get("w1").length, scale = 0.75 / Math.sqrt(size);

    // a model is one list of numbers: slope and height of a line, or w1, b1, w2 and b2 of a network
    const begin = (inner) => (inner === "line" ? [0.3, 0] : [...stage.get("w1"), ...stage.get("b1"), ...stage.get("w2"), 0]);
    const answer = (inner, p, x) => {
      if (inner === "line") return p[0] * x + p[1];
      let y = p[3 * size];
      for (let m = 0; m < size; m++) y += scale * p[2 * size + m] * geluAt(p[m] * x + p[size + m])[0];
      return y;
    };
    const slopes = (inner, p, x, error) => {
      if (inner === "line") return [error * x, error];
      const out = new Array(3 * size + 1);
      for (let m = 0; m < size; m++) {
        const [h, dh] = geluAt(p[m] * x + p[size + m]), back = error * scale * p[2 * size + m] * dh;
        out[m] = back * x; out[size + m] = back; out[2 * size + m] = error * scale * h;
      }
      out[3 * size] = error;
      return out;
    };
    const truth = (stream, x, t) => (stream === "change" && t >= 48 ? -1 : 1) * (0.9 * Math.sin(3 * x) + 0.25 * x);
    const keyAt = (stream, t) => (stream === "again" ? 0.5 : stream === "sweep" ? -0.95 + (1.9 * t) / (T - 1) : stage.get("places")[t]);

    const now = () => {
      const [inner, stream, rate, n, count] = ["inner", "stream", "rate", "batch", "token"].map((key) => stage.get(key));
      let p = begin(inner), start = p, from = 0, lastStart = p, lastFrom = 0;
      const read = [];
      for (let t = 0; t < count; t++) {
        if (t % n === 0) { start = p; from = t; }
        const x = keyAt(stream, t), v = truth(stream, x, t), error = answer(inner, start, x) - v;
        p = [...p];
        slopes(inner, start, x, error).forEach((g, i) => { p[i] -= rate * g; });
        read.push({ x, v, loss: error * error });
        lastStart = start; lastFrom = from;
      }
      const curve = Array.from({ length: 81 }, (_, i) => -1 + i / 40);
      let off = 0;
      for (const x of curve) off += (answer(inner, p, x) - truth(stream, x, Math.max(0, count - 1))) ** 2 / curve.length;
      return { inner, stream, rate, n, count, p, start: lastStart, from: lastFrom, read, curve, off, query: stage.get("query") };
    };
    let s = null;
    stage.draw(() => { s = now(); });

    stage.select("inner", { label: "the state is", options: stage.get("inners") });
    stage.select("stream", { label: "the text:", options: stage.get("streams") });
    stage.slider("batch", { label: "mini-batch, tokens", values: stage.get("batches"), format: (x) => String(x) });
    stage.slider("rate", { label: "rate η", values: stage.get("rates"), format: (x) => String(x) });
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    stage.player("token", { label: "tokens read", max: T, interval: 250 });

    const across = (width) => linearScale([-1, 1], [46, width - 14]);
    const up = linearScale([-TOP, TOP], [232, 30]);
    const held = (y, top) => Math.max(-top, Math.min(top, y));
    const setQuery = (x) => stage.set({ query: Math.max(-1, Math.min(1, Math.round(x * 50) / 50)) });
    const reading = () => answer(s.inner, s.p, s.query);
    stage.plot({
      height: (width) => (width < 520 ? 306 : 286),
      label: () => "The hidden map, the tokens read, the inner model now and the one at which the gradients are taken, with a query to drag",
      draw(layer, width) {
        const x = across(width), last = Math.max(0, s.count - 1);
        const line = (f, rest) => layer.append(svgLine(s.curve.map((k) => [x(k), up(held(f(k), TOP))]), rest));
        layer.append(
          axis(x, { at: 232, label: "", ticks: [-1, -0.5, 0, 0.5, 1], format: plainNumber }),
          axis(up, { side: "left", at: 46, label: "", ticks: [-1, 0, 1], format: plainNumber, grid: width - 60 }),
          svgText(0, 14, "what the state answers to a key"),
          svgLine([[x(s.query), 30], [x(s.query), 232]], { stroke: color("line"), "stroke-width": 1.5 }),
        );
        line((k) => truth(s.stream, k, last), { stroke: color("ink"), "stroke-width": 1.5, "stroke-dasharray": "7 4" });
        if (s.count > 0) line((k) => answer(s.inner, s.start, k), { stroke: grey, "stroke-width": 2, "stroke-dasharray": "2 4" });
        line((k) => answer(s.inner, s.p, k), { stroke: own, "stroke-width": 3 });
        s.read.forEach((token, t) => {
          const fresh = t >= s.from;
          layer.append(svgElement("circle", { cx: x(token.x), cy: up(token.v), r: fresh ? 4.5 : 2.5, fill: fresh ? dots : grey, "fill-opacity": fresh ? 1 : 0.6 }));
        });
        layer.append(svgElement("circle", { cx: x(s.query), cy: up(held(reading(), TOP)), r: 5, fill: "none", stroke: loud, "stroke-width": 2.5 }));
        const narrow = width < 520, places = narrow ? [[0, 272], [width / 2, 272], [0, 296], [width / 2, 296]] : [[0, 276], [130, 276], [278, 276], [476, 276]];
        const items = [["hidden map", color("ink"), "7 4", 1.5], ["model now", own, null, 3], ["gradients are taken here", grey, "2 4", 2], ["its mini-batch", dots, "dot", 0]];
        if (narrow) items[2][0] = "gradients' model";
        items.forEach(([words, stroke, dash, thick], i) => {
          const [px, py] = places[i];
          if (dash === "dot") layer.append(svgElement("circle", { cx: px + 12, cy: py - 4, r: 4.5, fill: dots }));
          else layer.append(svgLine([[px, py - 4], [px + 24, py - 4]], { stroke, "stroke-width": thick, ...(dash ? { "stroke-dasharray": dash } : {}) }));
          layer.append(svgText(px + 30, py, words));
        });
      },
      handles: [{
        label: "the query",
        at: (width) => [across(width)(stage.get("query")), 232],
        move: (px, _, width) => setQuery(across(width).invert(px)),
        nudge: (dx, dy) => setQuery(stage.get("query") + 0.1 * (dx || dy)),
        text: () => plainNumber(stage.get("query")),
        fill: loud,
      }],
    });

    const along = (width) => linearScale([0, T], [46, width - 14]);
    const tall = linearScale([0, LOSS], [116, 30]);
    stage.plot({
      height: 158,
      label: () => "Squared error of every token at the model that its gradient was taken at, with the ends of the mini-batches",
      draw(layer, width) {
        const x = along(width), wide = Math.max(1.5, (x(1) - x(0)) * 0.7);
        layer.append(
          axis(tall, { side: "left", at: 46, label: "", ticks: [0, 1, 2], format: (y) => (y === LOSS ? "2+" : plainNumber(y)), grid: width - 60 }),
          svgText(0, 14, "squared error that a token's gradient saw"),
          axis(x, { at: 116, label: "token", ticks: [0, 24, 48, 72, 96] }),
        );
        if (s.n > 1) for (let t = 0; t <= T; t += s.n) layer.append(svgLine([[x(t), 30], [x(t), 116]], { stroke: color("line"), "stroke-width": 1 }));
        s.read.forEach(({ loss }, t) => {
          const top = tall(Math.min(LOSS, Number.isFinite(loss) ? loss : LOSS)), fresh = t >= s.from;
          layer.append(svgElement("rect", { x: x(t) + 0.15 * wide, y: top, width: wide, height: Math.max(0.8, 116 - top), fill: fresh ? dots : own, "fill-opacity": fresh ? 1 : 0.75 }));
        });
      },
    });

    stage.readout(() => {
      const waits = Math.ceil(T / s.n), late = s.read.slice(-24), mean = late.reduce((sum, token) => sum + token.loss, 0) / Math.max(1, late.length);
      const work = `In mini-batches of ${s.n}, ${T} tokens are ${waits} steps that wait for each other.`;
      if (!s.count) return `Nothing read yet. ${work}`;
      const age = s.count - 1 - s.from;
      const old = age ? `the gradient of token ${s.count} was taken at a model that is ${age} ${age === 1 ? "token" : "tokens"} old` : `the gradient of token ${s.count} was taken at the model just before it`;
      const wild = !Number.isFinite(s.off) || s.off > 9 ? " The model has left the frame." : "";
      return `${work} Of ${s.count} tokens read, ${old}. To the key ${plainNumber(s.query)} the state answers ${plainNumber(reading())}; the map says ${plainNumber(truth(s.stream, s.query, s.count - 1))}. ` +
        `Mean square of the distance from the map: ${plainNumber(s.off)}; of the last ${late.length} errors: ${plainNumber(mean)}.${wild}`;
    });
    return stage.cleanup;
  },
};
