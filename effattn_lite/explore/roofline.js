// Reading and writing a text: four dots on a roofline, the time of a token, the bytes of the cache.

// FLOPs and bytes of the weights' and of attention's part of a pass; every number is moved once
function parts({ L, D, H, K, F, vocab }, { kv, size, batch, context }, prefill) {
  const layer = 2 * D * H * K + 2 * D * kv * K + 3 * D * F, read = L * layer + vocab * D;
  // inputs and outputs of the seven products of a layer, numbers a token
  const moved = L * (2 * (D + H * K) + 2 * (D + kv * K) + 3 * (D + F)), cache = L * kv * 2 * K * size;
  const tokens = batch * (prefill ? context : 1), pairs = batch * (prefill ? (context * (context + 1)) / 2 : context);
  return {
    // only the last token of a prompt needs the vocabulary
    weights: { flops: 2 * (L * layer * tokens + vocab * D * batch), bytes: size * (read + tokens * moved) },
    attention: { flops: 4 * L * H * K * pairs, bytes: cache * batch * context + size * tokens * L * 2 * H * K },
  };
}

const intensityOf = ({ flops, bytes }) => flops / bytes;

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), contexts = stage.get("contexts");
    const kept = stage.get("models"), machines = stage.get("machines");
    const paint = { prefill: color("accent"), decode: color("second") };

    const now = (context = stage.get("context")) => {
      const net = kept[stage.get("model")], machine = machines[stage.get("machine")];
      const set = { kv: Math.min(stage.get("kv"), net.H), size: stage.get("size"), batch: stage.get("batch"), context };
      const seconds = ({ flops, bytes }) => Math.max(flops / machine.product, bytes / machine.copy) / 1e12;
      const [prefill, decode] = [true, false].map((first) => {
        const both = parts(net, set, first), time = { weights: seconds(both.weights), attention: seconds(both.attention) };
        return { ...both, time, total: time.weights + time.attention };
      });
      const stored = net.L * (2 * net.D * net.H * net.K + 2 * net.D * set.kv * net.K + 3 * net.D * net.F)
        + (net.tied ? 1 : 2) * net.vocab * net.D;
      const cache = net.L * set.kv * 2 * net.K * set.size;
      return { net, machine, ...set, prefill, decode, weights: stored * set.size, cache, room: machine.memory * 1e9 };
    };

    stage.select("model", { label: "model", options: kept.map((m, i) => [i, m.name]) });
    stage.select("machine", { label: "on", options: machines.map((m, i) => [i, m.name]) });
    stage.select("size", { label: "numbers stored in", options: [[2, "16 bits"], [1, "8 bits"], [0.5, "4 bits"]] });
    stage.slider("batch", { label: "texts at once, B", values: [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] });
    stage.slider("context", { label: "tokens of each, T", values: contexts, format: (x) => formatNumber(x, 7) });
    stage.slider("kv", { label: "key/value heads, HKV", values: [1, 2, 4, 8, 16, 32, 64] });
    // another model brings its own key heads
    const own = () => stage.set({ kv: kept[stage.get("model")].HKV });
    model.on("change:model", own);
    stage.undo.push(() => model.off("change:model", own));

    stage.plot({
      height: 300,
      label: () => "Roofline: the speed that each part can reach against its FLOPs a byte; the numbers are in the sentence below",
      draw(layer, width, height) { drawRoof(layer, width, height, now(), paint); },
    });

    const frame = (width) => logScale([contexts[0], contexts[contexts.length - 1]], [46, width - 16]);
    const span = () => {
      const [low, high] = [contexts[0], contexts[contexts.length - 1]].map((T) => now(T).decode);
      const least = 1e3 * Math.max(low.time.attention, low.time.weights / 30);
      return [10 ** Math.floor(Math.log10(Math.min(least, 1e3 * low.time.weights))), 10 ** Math.ceil(Math.log10(1.2e3 * high.total))];
    };
    stage.plot({
      height: 236,
      label: () => "Milliseconds of one written token a text against the length of the text; dashed the weights' share, dotted the cache's",
      draw(layer, width, height) { drawSteps(layer, width, height, now, frame(width), span(), contexts, paint); },
      handles: [{
        label: "tokens of each text", fill: color("second"),
        at: (width) => [frame(width)(stage.get("context")), logScale(span(), [192, 28])(1e3 * now().decode.total)],
        move: (x, y, width) => stage.set({ context: contexts[nearestLog(contexts, frame(width).invert(x))] }),
        nudge: (dx, dy) => {
          const next = nearestOf(contexts, stage.get("context")) + (dx || dy);
          if (next >= 0 && next < contexts.length) stage.set({ context: contexts[next] });
        },
        text: () => `${stage.get("context")} tokens`,
      }],
    });

    stage.plot({
      height: 74,
      label: () => "Memory of the machine: the weights, then the caches of all texts",
      draw(layer, width) { drawMemory(layer, width, now(), paint); },
    });
    stage.readout(() => sentence(now()));
    return stage.cleanup;
  },
};

function nearestLog(values, x) {
  return values.reduce((best, v, i) => (Math.abs(Math.log(v / x)) < Math.abs(Math.log(values[best] / x)) ? i : best), 0);
}

function drawRoof(layer, width, height, { machine, prefill, decode }, paint) {
  const bottom = height - 44, x = logScale([0.5, 1e6], [46, width - 16]), y = logScale([0.1, 5000], [bottom, 26]);
  const roof = (i) => Math.min(machine.copy * i, machine.product), ridge = machine.product / machine.copy;
  layer.append(
    axis(x, { at: bottom, label: "FLOPs a byte", ticks: [1, 10, 100, 1e3, 1e4, 1e5, 1e6], format: short }),
    axis(y, { side: "left", at: 46, label: "TFLOP/s within reach", ticks: [0.1, 1, 10, 100, 1000], grid: width - 62 }),
    svgElement("line", { x1: x(ridge), x2: x(ridge), y1: y(roof(ridge)), y2: bottom, stroke: color("muted"), "stroke-dasharray": "3 4" }),
    svgLine([0.5, ridge, 1e6].map((i) => [x(i), y(roof(i))]), { stroke: color("ink") }),
    svgText(x(ridge) + 5, bottom - 24, `ridge: ${formatNumber(ridge)}`, { class: "muted" }),
    svgText(x(ridge) - 6, bottom - 8, "bytes decide", { anchor: "end", class: "muted" }),
    svgText(x(ridge) + 5, bottom - 8, "FLOPs decide", { class: "muted" }),
  );
  layer.append(
    svgText(width - 76, 14, "prefill", { anchor: "end", style: `fill:${paint.prefill}` }), svgText(width - 16, 14, "decode", { anchor: "end", style: `fill:${paint.decode}` }),
  );
  const ground = `paint-order:stroke;stroke:${color("paper")};stroke-width:5px;stroke-linejoin:round`;
  for (const [name, pass] of Object.entries({ prefill, decode })) {
    for (const part of ["weights", "attention"]) {
      const i = intensityOf(pass[part]), px = x(i), py = y(roof(i)), above = part === "attention", style = `${ground};fill:${paint[name]}`;
      const look = { fill: paint[name], stroke: color("paper"), "stroke-width": 2 };
      layer.append(
        above ? svgElement("circle", { cx: px, cy: py, r: 8, ...look }) : svgElement("rect", { x: px - 7, y: py - 7, width: 14, height: 14, ...look }),
        // above the slope there is room to the left of a dot, under it to the right
        above ? svgText(Math.max(62, px - 7), py - 13, part, { anchor: "end", style }) : svgText(px + 9, py + 19, part, { style }),
      );
    }
  }
}

function drawSteps(layer, width, height, now, x, [low, high], contexts, paint) {
  const bottom = height - 44, y = logScale([low, high], [bottom, 28]), right = width - 16;
  const at = now(), most = (at.room - at.weights) / (at.batch * at.cache), from = Math.max(46, Math.min(right, most > 0 ? x(Math.max(1, most)) : 46));
  if (from < right) {
    layer.append(svgElement("rect", { x: from, y: 28, width: right - from, height: bottom - 28, fill: color("wrong"), "fill-opacity": 0.12 }));
    if (right - from > 90) layer.append(svgText(right - 4, bottom - 8, "no room in memory", { anchor: "end", style: `fill:${color("wrong")}` }));
  }
  const line = (of, rest) => svgLine(contexts.map((T) => { const ms = 1e3 * of(now(T).decode); return [x(T), ms < low ? NaN : y(ms)]; }), rest);
  layer.append(
    axis(x, { at: bottom, label: "T, tokens of each text", ticks: contexts.filter((_, i) => i % (width < 480 ? 5 : 2) === 0), format: (v) => formatNumber(v, 7) }),
    axis(y, { side: "left", at: 46, label: "decode, ms a step", ticks: 5, format: short, grid: width - 62 }),
    line((d) => d.time.weights, { stroke: color("muted"), "stroke-dasharray": "6 4", "stroke-width": 1.5 }),
    line((d) => d.time.attention, { stroke: color("muted"), "stroke-dasharray": "2 3", "stroke-width": 1.5 }),
    line((d) => d.total, { stroke: paint.decode, "stroke-width": 2.5 }),
    svgText(right, 14, "– – weights   ··· cache", { anchor: "end", class: "muted" }),
  );
}

function drawMemory(layer, width, { weights, cache, batch, context, room, machine }, paint) {
  const caches = cache * batch * context, full = Math.max(room, weights + caches), left = 2, right = width - 16;
  const x = linearScale([0, full], [left, right]), fits = weights + caches <= room;
  layer.append(
    svgText(0, 14, fits ? `memory: ${formatUnit(weights, "B")} of weights, ${formatUnit(caches, "B")} of cache` : `${formatUnit(weights + caches, "B")} do not fit into ${machine.memory} GB`, fits ? {} : { style: `fill:${color("wrong")}` }),
    svgElement("rect", { x: left, y: 22, width: x(full) - left, height: 24, fill: color("panel") }),
    svgElement("rect", { x: left, y: 22, width: x(weights) - left, height: 24, fill: color("muted") }),
    svgElement("rect", { x: x(weights), y: 22, width: x(weights + caches) - x(weights), height: 24, fill: fits ? paint.decode : color("wrong") }),
    svgElement("rect", { x: left, y: 22, width: x(room) - left, height: 24, fill: "none", stroke: color("ink"), "stroke-width": 1.5 }),
    svgText(Math.max(60, x(room)), 64, `${machine.memory} GB`, { anchor: "end", class: "muted" }),
  );
}

function short(x) {
  return x >= 1e6 ? `${x / 1e6} M` : x >= 1e3 ? `${x / 1e3} k` : String(x);
}

function sentence({ net, machine, kv, batch, context, prefill, decode, weights, cache, room }) {
  const caches = cache * batch * context, many = batch > 1;
  const rate = formatNumber(batch / decode.total), ms = formatNumber(1e3 * decode.total);
  const time = prefill.total >= 1 ? `${formatNumber(prefill.total)} s` : `${formatNumber(1e3 * prefill.total)} ms`;
  const fits = weights + caches <= room ? "" : ` Weights and cache together do not fit into ${machine.memory} GB.`;
  return `${net.name} with ${kv} key/value ${kv === 1 ? "head" : "heads"}: a token of cache takes ${formatUnit(cache, "B")}, ${many ? `${batch} texts` : "one text"} of ${formatNumber(context, 7)} tokens ${formatUnit(caches, "B")}. `
    + `Reading ${many ? "them" : "it"} takes at least ${time}. A step of writing takes ${ms} ms or more, so at most ${rate} tokens a second${many ? " over all texts" : ""}: `
    + `the weights get ${formatNumber(intensityOf(decode.weights))} FLOP/byte, attention gets ${formatNumber(intensityOf(decode.attention))}, and the ridge is at ${formatNumber(machine.product / machine.copy)}.${fits}`;
}
