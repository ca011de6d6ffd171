// The chunk length as a dial from the recurrent to the parallel form, and scans that fill a triangle.

const ITEMS = 16;

// FLOPs a token of the products inside a chunk and of those with the state, and the chunks that wait in line
function costOf(T, C, d, price) {
  const chunks = Math.ceil(T / C), scores = 4 * d * C, state = chunks > 1 ? 4 * d * d : 0, waiting = (price * chunks) / T;
  return { chunks, scores, state, waiting, total: scores + state + waiting };
}

// the rounds of a scan; each a list of pairs [i, j]: item i takes in what item j has summed up
function roundsOf(kind, n = ITEMS) {
  const all = Array.from({ length: n }, (_, i) => i), rounds = [];
  if (kind === "sequential") for (let i = 1; i < n; i++) rounds.push([[i, i - 1]]);
  if (kind === "hillis") for (let d = 1; d < n; d *= 2) rounds.push(all.slice(d).map((i) => [i, i - d]));
  if (kind === "blelloch") {
    for (let d = 1; d < n; d *= 2) rounds.push(all.filter((i) => (i + 1) % (2 * d) === 0).map((i) => [i, i - d]));
    for (let d = n / 4; d >= 1; d /= 2) rounds.push(all.filter((i) => i >= 2 * d && (i + 1) % (2 * d) === d).map((i) => [i, i - d]));
  }
  if (kind === "chunks") {
    for (let r = 1; r < 4; r++) rounds.push(all.filter((i) => i % 4 === r).map((i) => [i, i - 1]));
    for (let i = 7; i < n; i += 4) rounds.push([[i, i - 4]]);
    rounds.push(all.filter((i) => i > 3 && i % 4 < 3).map((i) => [i, i - (i % 4) - 1]));
  }
  return rounds;
}

// the first token that each item has summed up after some rounds, and what the last round changed
function covered(kind, count) {
  const from = Array.from({ length: ITEMS }, (_, i) => i), before = [...from], rounds = roundsOf(kind);
  const done = Math.min(count, rounds.length);
  for (const round of rounds.slice(0, done)) {
    from.forEach((x, i) => { before[i] = x; });
    for (const [i, j] of round) from[i] = before[j];
  }
  const sizes = rounds.map((round) => round.length);
  return { from, before, done, rounds: rounds.length, last: done ? rounds[done - 1] : [], combined: sizes.slice(0, done).reduce((a, b) => a + b, 0), work: sizes.reduce((a, b) => a + b, 0) };
}

const power = (x) => (x >= 1e9 ? `${x / 1e9} G` : x >= 1e6 ? `${x / 1e6} M` : x >= 1e3 ? `${x / 1e3} k` : String(x));
const whole = (x) => formatNumber(x, 7);

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), blue = familyColor("fixed decay"), warm = color("second");
    const chunks = () => Array.from({ length: Math.log2(stage.get("tokens")) + 1 }, (_, n) => 2 ** n);
    const now = () => {
      const [T, d, price] = ["tokens", "size", "price"].map((key) => stage.get(key)), C = Math.min(stage.get("chunk"), T);
      return { T, C, d, price, ...costOf(T, C, d, price), best: Math.sqrt(price / (4 * d)) };
    };

    stage.select("tokens", { label: "tokens T", options: stage.get("lengths").map((T) => [T, whole(T)]) });
    stage.select("size", { label: "K = V", options: [32, 64, 128] });
    stage.slider("chunk", { label: "tokens of a chunk, C", values: Array.from({ length: 21 }, (_, n) => 2 ** n), format: (C) => whole(Math.min(C, stage.get("tokens"))) });
    stage.slider("price", { label: "a step in line costs, FLOPs", values: Array.from({ length: 10 }, (_, n) => 10 ** n), format: power });

    const side = (width) => Math.min(230, Math.round(width * 0.44));
    stage.plot({
      height: (width) => side(width) + 34,
      label: () => `The triangle of scores of ${now().T} tokens in ${now().chunks} chunks; the sentence below has its numbers`,
      draw(layer, width) { drawTriangle(layer, width, side(width), now(), blue, warm); },
    });

    const frame = (width) => logScale([1, stage.get("tokens")], [54, width - 18]);
    const span = () => {
      const { T, d, price } = now(), totals = chunks().map((C) => costOf(T, C, d, price).total);
      return [10 ** Math.floor(Math.log10(Math.min(...totals) / 20)), 10 ** Math.ceil(Math.log10(Math.max(...totals) * 1.05))];
    };
    stage.plot({
      height: 246,
      label: () => "Cost of a token in FLOPs against the chunk length: scores rise, the state's share is level, waiting falls, and their sum has a lowest point",
      draw(layer, width, height) { drawCosts(layer, width, height, now(), frame(width), span(), chunks(), blue, warm); },
      handles: [{
        label: "tokens of a chunk", fill: color("ink"),
        at: (width) => [frame(width)(now().C), logScale(span(), [202, 30])(now().total)],
        move: (x, y, width) => {
          const C = frame(width).invert(x), all = chunks();
          stage.set({ chunk: all.reduce((best, c) => (Math.abs(Math.log(c / C)) < Math.abs(Math.log(best / C)) ? c : best), 1) });
        },
        nudge: (dx, dy) => stage.set({ chunk: Math.max(1, Math.min(now().T, now().C * 2 ** (dx || dy))) }),
        text: () => `${now().C} tokens`,
      }],
    });
    stage.readout(() => sentence(now()));

    const kinds = stage.get("scans"), state = () => covered(stage.get("scan"), stage.get("round"));
    stage.select("scan", { label: "scan of 16 items", options: kinds });
    stage.player("round", { label: "rounds done", max: () => state().rounds, interval: 900 });
    stage.plot({
      height: (width) => side(width) + 34,
      label: () => `Which tokens each of ${ITEMS} items has summed up after ${state().done} rounds`,
      draw(layer, width) { drawScan(layer, width, side(width), state(), blue, warm); },
    });
    stage.readout(() => {
      const { done, rounds, combined, work, from } = state(), name = kinds.find(([kind]) => kind === stage.get("scan"))[1];
      const right = from.filter((x) => x === 0).length;
      return `${name}: ${done} of ${rounds} rounds done with ${combined} of ${work} combinations; ${right} of ${ITEMS} items have summed up all that came before them.`;
    });
    return stage.cleanup;
  },
};

function words(layer, x, pairs) {
  pairs.forEach(([name, value], i) => layer.append(
    svgText(x, 30 + i * 44, name, { class: "muted" }), svgText(x, 49 + i * 44, value, { "font-weight": 600 }),
  ));
}

// what the colours mean, where there is room beside the numbers
function legend(layer, width, x, entries) {
  if (width < 600) return;
  entries.forEach(([fill, opacity, text], i) => layer.append(
    svgElement("rect", { x, y: 42 + i * 26, width: 13, height: 13, fill, "fill-opacity": opacity }), svgText(x + 20, 53 + i * 26, text),
  ));
}

function drawTriangle(layer, width, side, { T, C, d, chunks, scores, state }, blue, warm) {
  const left = 20, top = 22, c = (side * C) / T;
  layer.append(
    svgElement("path", { d: `M${left} ${top}V${top + side}H${left + side}Z`, fill: warm, "fill-opacity": 0.32 }),
    svgText(left + side / 2, 14, "keys", { anchor: "middle", class: "muted" }),
    svgText(0, 0, "queries", { anchor: "middle", class: "muted", transform: `translate(13 ${top + side / 2}) rotate(-90)` }),
  );
  if (chunks > 64) layer.append(svgLine([[left, top], [left + side, top + side]], { stroke: blue, "stroke-width": 1.5 }));
  else {
    const steps = Array.from({ length: chunks }, (_, n) => [left + n * c, top + n * c]);
    layer.append(svgElement("path", { d: steps.map(([x, y]) => `M${x.toFixed(2)} ${y.toFixed(2)}v${c.toFixed(2)}h${c.toFixed(2)}Z`).join(""), fill: blue, stroke: blue, "stroke-width": 0.8 }));
  }
  words(layer, left + side + 22, [
    ["work", `${formatUnit((scores + state) * T, "FLOP")}`],
    ["steps in line", whole(chunks)],
    ["scores computed, of T²", percent(Math.min(1, C / T))],
    [chunks > 1 ? "states passed on" : "no state needed", chunks > 1 ? formatUnit((chunks - 1) * d * d * 4, "B") : "0 B"],
  ]);
  legend(layer, width, left + side + 190, [[blue, 1, "scores, inside a chunk"], [warm, 0.32, "never computed: read through S"]]);
}

function percent(x) {
  return x < 1e-4 ? "< 0.01 %" : `${formatNumber(100 * x)} %`;
}

function drawCosts(layer, width, height, { T, C, d, price, best }, x, [low, high], chunks, blue, warm) {
  const bottom = height - 44, y = logScale([low, high], [bottom, 30]), right = width - 18;
  const line = (of, rest) => svgLine(chunks.map((c) => { const v = of(costOf(T, c, d, price)); return [x(c), v < low ? NaN : y(v)]; }), rest);
  const every = chunks.filter((_, i) => i % Math.ceil(chunks.length / (width < 480 ? 4 : 8)) === 0);
  layer.append(
    axis(x, { at: bottom, label: "C, tokens of a chunk", ticks: every, format: (v) => formatNumber(v, 7) }),
    axis(y, { side: "left", at: 54, label: "FLOPs a token", ticks: 5, grid: width - 72, format: (v) => power(Number(v.toPrecision(6))) }),
    line((c) => c.scores, { stroke: blue, "stroke-width": 1.5, "stroke-dasharray": "6 4" }),
    line((c) => c.state || NaN, { stroke: warm, "stroke-width": 1.5, "stroke-dasharray": "6 4" }),
    line((c) => c.waiting, { stroke: color("muted"), "stroke-width": 1.5, "stroke-dasharray": "2 3" }),
    line((c) => c.total, { stroke: color("ink"), "stroke-width": 2.5 }),
    svgText(right, 14, "waiting", { anchor: "end", class: "muted" }), svgText(right - 58, 14, "state", { anchor: "end", style: `fill:${warm}` }),
    svgText(right - 100, 14, "scores", { anchor: "end", style: `fill:${blue}` }),
  );
  if (best > 1 && best < T) {
    layer.append(svgElement("line", { x1: x(best), x2: x(best), y1: bottom, y2: bottom - 16, stroke: color("ink"), "stroke-width": 2 }), svgText(x(best), bottom - 20, "C*", { anchor: "middle" }));
  }
}

function drawScan(layer, width, side, { from, before, last, done, rounds, combined, work }, blue, warm) {
  const left = 20, top = 22, cell = side / ITEMS, fresh = new Set(last.map(([i]) => i));
  layer.append(
    svgElement("path", { d: `M${left} ${top}V${top + side}H${left + side}Z`, fill: color("panel") }),
    svgText(left + side / 2, 14, "tokens", { anchor: "middle", class: "muted" }),
    svgText(0, 0, "items", { anchor: "middle", class: "muted", transform: `translate(13 ${top + side / 2}) rotate(-90)` }),
  );
  from.forEach((start, i) => {
    for (let j = start; j <= i; j++) {
      const isNew = fresh.has(i) && j < before[i];
      layer.append(svgElement("rect", { x: left + j * cell, y: top + i * cell, width: cell - 1, height: cell - 1, fill: isNew ? warm : blue, "fill-opacity": start === 0 ? 1 : 0.55 }));
    }
  });
  words(layer, left + side + 22, [
    ["rounds", `${done} of ${rounds}`], ["combinations", `${combined} of ${work}`],
    ["at once, this round", String(last.length)], ["items finished", `${from.filter((x) => x === 0).length} of ${ITEMS}`],
  ]);
  legend(layer, width, left + side + 190, [[blue, 0.55, "summed up earlier"], [warm, 1, "taken in by the last round"], [blue, 1, "the item is finished"]]);
}

function sentence({ T, C, d, price, chunks, scores, state, total, best }) {
  const form = C === 1 ? "the recurrent form" : chunks === 1 ? "the parallel form" : `${whole(chunks)} chunks of ${whole(C)}`;
  const least = best <= 1 ? "Here steps cost nothing, and single tokens are cheapest." : best >= T ? "Steps cost so much here that one chunk, the parallel form, is near the best." : `The cheapest chunk has about ${formatNumber(best, 2)} tokens.`;
  return `${whole(T)} tokens with K = V = ${d}, ${form}: a token takes ${whole(Math.round(scores))} FLOPs for scores and ${whole(state)} for the state, `
    + `and ${whole(chunks)} ${chunks === 1 ? "step waits" : "steps wait"} in line. With a step worth ${power(price)} FLOPs that is ${formatNumber(total)} a token in all. ${least}`;
}
