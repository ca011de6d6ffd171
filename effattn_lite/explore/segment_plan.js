// Cut a text into segments: which processors work, what is moved, and how long that takes at least and at most.

const ROUND = 64, SQUARE = 64, COUNTS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 17, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256];
const cdiv = (a, b) => Math.ceil(a / b);

// bytes once and as asked for, FLOPs and programs of the launches; two bytes a number, four in a state
function launches({ tokens, heads, size, chunk, columns }, wanted) {
  const L = ROUND * cdiv(cdiv(tokens, wanted), ROUND), n = cdiv(tokens, L), state = 4 * size * size * heads;
  const BV = Math.min(columns, size), tiles = cdiv(size, BV), squares = cdiv(size, Math.min(SQUARE, size));
  const written = (n - 1) * L * heads, all = tokens * heads, list = [];
  if (n > 1) {
    list.push({
      name: "write", programs: (n - 1) * heads * squares * squares,
      once: 4 * written * size + state * (n - 1), asked: 4 * written * size * squares + state * (n - 1),
      states: state * (n - 1), flops: 2 * written * size * size,
    });
  }
  list.push({
    name: "read", programs: n * heads * tiles,
    once: 8 * all * size + state * (n - 1), asked: 4 * all * size * (tiles + 1) + (state * n * (n - 1)) / 2,
    states: (state * n * (n - 1)) / 2, flops: all * (tiles * 2 * chunk * size + 2 * chunk * size + 4 * size * size),
  });
  return { L, n, list };
}

// the rule of the engine: about four programs a processor, no more than 64 segments
function engineChoice({ tokens, heads, size, processors }) {
  const L = ROUND * cdiv(Math.max(cdiv(tokens * cdiv(size, 64) * heads, 4 * processors), cdiv(tokens, 64)), ROUND);
  return cdiv(tokens, L);
}

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), copy = stage.get("copy") * 1e9, product = stage.get("product") * 1e9;
    const keys = ["tokens", "heads", "size", "chunk", "columns", "processors"];
    const sizes = () => Object.fromEntries(keys.map((key) => [key, stage.get(key)]));
    const counts = () => COUNTS.filter((n) => n <= stage.get("tokens") / ROUND);
    const price = (wanted) => {
      const set = sizes(), plan = launches(set, wanted), sum = (key) => plan.list.reduce((s, x) => s + x[key], 0);
      const busy = (x) => Math.min(1, x.programs / set.processors);
      const low = plan.list.reduce((s, x) => s + Math.max(x.once / copy, x.flops / product) / busy(x), 0);
      const high = plan.list.reduce((s, x) => s + (x.asked / copy + x.flops / product) / busy(x), 0);
      const ideal = 8 * set.tokens * set.heads * set.size;
      const floor = Math.max(ideal / copy, (4 * set.tokens * set.heads * set.size ** 2) / product);
      return { ...set, ...plan, low, high, floor, ideal, once: sum("once"), asked: sum("asked"), states: sum("states"), flops: sum("flops") };
    };
    // the other plan: the state of every chunk goes to memory in 16 bits and comes back
    const perChunk = () => {
      const { tokens, heads, size, chunk } = sizes(), all = tokens * heads, states = (2 * all * size * size) / chunk;
      return (12 * all * size + 2 * states) / copy;
    };
    const now = () => price(stage.get("segments"));
    const found = () => {
      const set = sizes(), own = set.heads === 16 && set.size === 128;
      return own ? stage.get("recorded").filter(([, T]) => T === set.tokens) : [];
    };

    stage.slider("tokens", { label: "tokens, T", values: Array.from({ length: 7 }, (_, i) => 2 ** (11 + i)), format: (x) => formatNumber(x, 7) });
    stage.slider("heads", { label: "heads, H", values: [1, 2, 4, 8, 16, 32, 64] });
    stage.slider("segments", { label: "segments", values: COUNTS });
    stage.slider("chunk", { label: "tokens of a chunk, C", values: [16, 32, 64, 128] });
    stage.slider("columns", { label: "columns of V a program, BV", values: [32, 64, 128] });
    stage.select("size", { label: "K = V", options: [64, 128, 256] });
    stage.button({ label: "One program a head", press: () => stage.set({ segments: 1 }), disabled: () => stage.get("segments") === 1 });
    stage.button({
      label: "The engine's choice", press: () => stage.set({ segments: engineChoice(sizes()) }),
      disabled: () => stage.get("segments") === engineChoice(sizes()),
    });

    stage.plot({
      height: 172,
      label: () => { const x = now(); return `The text in ${x.n} segments, and ${x.processors} processors for ${x.list[x.list.length - 1].programs} programs of the read`; },
      draw(layer, width) { drawCard(layer, width, now()); },
    });
    stage.plot({
      height: 128,
      label: () => { const x = now(); return `Bytes: ideal ${formatUnit(x.ideal, "B")}, each launch once ${formatUnit(x.once, "B")}, asked for ${formatUnit(x.asked, "B")}`; },
      draw(layer, width) { drawBytes(layer, width, now()); },
    });
    const frame = (width) => logScale([1, Math.max(...counts())], [46, width - 18], 2);
    const span = () => {
      const all = counts().map(price), top = Math.max(...all.map((x) => x.high), ...found().map(([, , ms]) => ms));
      return [10 ** Math.floor(Math.log10(all[0].floor)), 1.25 * top];
    };
    stage.plot({
      height: 268,
      label: () => "Predicted time of the forward pass against the number of segments: a band between the low and the high bound",
      draw(layer, width, height) { drawTime(layer, width, height, { x: frame(width), span: span(), counts: counts(), price, found: found(), perChunk: perChunk(), chosen: engineChoice(sizes()) }); },
      handles: [{
        label: "segments", fill: color("second"),
        at: (width) => { const x = now(); return [frame(width)(Math.min(x.n, Math.max(...counts()))), logScale(span(), [224, 24])(x.low)]; },
        move: (x, y, width) => {
          const at = frame(width).invert(x), all = counts();
          stage.set({ segments: all.reduce((best, n) => (Math.abs(Math.log(n / at)) < Math.abs(Math.log(best / at)) ? n : best), all[0]) });
        },
        nudge: (dx, dy) => { const all = counts(), next = nearestOf(all, stage.get("segments")) + (dx || dy); if (all[next]) stage.set({ segments: all[next] }); },
        text: () => `${stage.get("segments")} segments`,
      }],
    });
    stage.readout(() => sentence(now(), found(), perChunk()));
    return stage.cleanup;
  },
};

function drawCard(layer, width, { n, list, processors, heads }) {
  const read = list[list.length - 1], gap = 1.5, left = 2, right = width - 4, w = (right - left) / n;
  layer.append(svgText(left, 13, n > 1 ? `one head's text in ${n} segments` : "one head's text, whole"));
  for (let i = 0; i < n; i++) {
    layer.append(svgElement("rect", {
      x: left + i * w, y: 20, width: Math.max(0.8, w - (w > 4 ? gap : 0.2)), height: 20, fill: color("second"), "fill-opacity": i < n - 1 ? 0.75 : 0.35,
    }));
  }
  layer.append(svgText(left, 56, n > 1 ? "full: leaves a state to those right of it" : "nothing to hand on: the first launch is left out", { class: "muted" }));
  const columns = width < 480 ? 22 : 33, size = (right - left) / columns, top = 84, each = read.programs / processors;
  layer.append(svgText(left, 78, `${formatNumber(read.programs, 6)} programs read on ${processors} processors${each >= 1 ? `: ${formatNumber(each)} each` : `: ${processors - read.programs} idle`}`));
  const rows = cdiv(processors, columns), step = Math.min(size, 82 / rows);
  for (let i = 0; i < processors; i++) {
    const works = i < read.programs;
    layer.append(svgElement("rect", {
      x: left + (i % columns) * size, y: top + Math.floor(i / columns) * step, width: size - 2.5, height: step - 2.5, rx: 2,
      fill: works ? color("accent") : "none", "fill-opacity": Math.min(1, 0.35 + 0.16 * each), stroke: works ? color("accent") : color("muted"),
    }));
  }
}

function drawBytes(layer, width, { ideal, list, once, asked }) {
  const left = 2, right = width - 4, x = linearScale([0, Math.max(asked, once)], [0, right - left]);
  const rows = [
    ["ideal: every number once", [[ideal, "muted", 1]]],
    ["each launch, once", list.flatMap((l) => [[l.once, l.name === "read" ? "accent" : "second", 1]])],
    ["asked for by programs", list.flatMap((l) => [[l.asked - l.states, l.name === "read" ? "accent" : "second", 1], [l.states, "wrong", 0.8]])],
  ];
  rows.forEach(([words, parts], i) => {
    const y = 4 + 40 * i;
    let at = left;
    layer.append(svgText(left, y + 12, `${words}: ${formatUnit(parts.reduce((s, [b]) => s + b, 0), "B")}`));
    for (const [bytes, paint, strength] of parts) {
      if (bytes > 0) layer.append(svgElement("rect", { x: at, y: y + 17, width: Math.max(0.5, x(bytes)), height: 14, fill: color(paint), "fill-opacity": strength }));
      at += x(bytes);
    }
  });
  if (width > 520) {
    const key = [["write", "second"], ["read", "accent"], ["states", "wrong"]];
    key.forEach(([words, paint], i) => layer.append(svgText(right - 142 + 50 * i, 12, words, { style: `fill:${color(paint)}` })));
  }
}

function drawTime(layer, width, height, { x, span, counts, price, found, perChunk, chosen }) {
  const bottom = height - 44, y = logScale(span, [bottom, 24]), all = counts.map(price), right = width - 18;
  const at = (key) => all.map((p) => [x(p.n), y(p[key])]);
  const band = [...at("high"), ...at("low").reverse()].map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" ");
  const low = Math.ceil(Math.log10(span[0]) - 1e-9), ticks = [];
  for (let d = low; 10 ** d <= span[1]; d++) for (const m of [1, 2, 5]) if (m * 10 ** d <= span[1]) ticks.push(Number((m * 10 ** d).toPrecision(2)));
  layer.append(
    axis(x, { at: bottom, label: "segments of the text", ticks: [1, 2, 4, 8, 16, 32, 64, 128, 256].filter((n) => n <= Math.max(...counts)), format: String }),
    axis(y, { side: "left", at: 46, label: "forward, ms", ticks, format: (v) => String(v), grid: width - 64 }),
    svgElement("polygon", { points: band, fill: color("accent"), "fill-opacity": 0.18 }),
    svgLine(at("low"), { stroke: color("accent") }), svgLine(at("high"), { stroke: color("accent") }),
    svgLine([[46, y(all[0].floor)], [right, y(all[0].floor)]], { stroke: color("muted"), "stroke-dasharray": "5 4" }),
    svgText(right, y(all[0].floor) + 15, "floor", { anchor: "end", class: "muted" }),
  );
  if (perChunk < span[1] && perChunk > span[0]) {
    layer.append(
      svgLine([[46, y(perChunk)], [right, y(perChunk)]], { stroke: color("second"), "stroke-dasharray": "2 4" }),
      svgText(52, y(perChunk) - 5, "a state a chunk, low", { style: `fill:${color("second")};paint-order:stroke;stroke:${color("paper")};stroke-width:4px` }),
    );
  }
  for (const [impl, , ms] of found) {
    const own = impl === "triton", px = own ? x(chosen) : right - 10, py = y(ms), paint = color(own ? "ink" : "second");
    layer.append(
      svgElement("path", { d: `M${px - 7} ${py}L${px} ${py - 7}L${px + 7} ${py}L${px} ${py + 7}Z`, fill: paint, stroke: color("paper"), "stroke-width": 1.5 }),
      svgText(own ? px + 11 : px - 11, py - 7, own ? "recorded" : "fla, recorded", {
        anchor: own ? "start" : "end", style: `fill:${paint};paint-order:stroke;stroke:${color("paper")};stroke-width:4px`,
      }),
    );
  }
}

function sentence({ n, L, list, processors, ideal, once, asked, low, high, floor, flops, tokens }, found, perChunk) {
  const read = list[list.length - 1], idle = Math.max(0, processors - read.programs), ms = (x) => `${formatNumber(x)} ms`;
  const cut = n > 1 ? `${n} segments of ${formatNumber(L, 6)} tokens` : "One segment";
  const told = found.map(([impl, , t]) => `${impl === "triton" ? "recorded" : impl + " recorded"} ${ms(t)}`).join(", ");
  return `${cut}: ${formatNumber(read.programs, 6)} programs read, ${idle ? `${idle} of ${processors} processors idle` : `${formatNumber(read.programs / processors)} a processor`}. `
    + `${formatUnit(flops, "FLOP")}; ${formatUnit(once, "B")} if each launch fetches once, ${formatUnit(asked, "B")} as asked for, ${formatUnit(ideal, "B")} ideally. `
    + `Between ${ms(low)} and ${ms(high)}; floor ${ms(floor)}; with a state a chunk at least ${ms(perChunk)}.`
    + (told ? ` For ${formatNumber(tokens, 7)} tokens: ${told}.` : "");
}
