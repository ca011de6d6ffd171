// The launch of a tiled matrix product: the grid over C, one program's tiles of A and B, the chip's memory.

const EDGE = 128, GAP = 26;
// shared memory a program may have, KiB (NVIDIA's arch_traits.h), and how many buffers of A and B the compiler keeps
const CHIPS = [
  ["T4", 64, () => 1],
  ["A100", 163, ({ stages }) => Math.max(1, stages - 1)],
  ["H100", 227, ({ stages, BM }) => (BM < 64 ? Math.max(1, stages - 1) : stages)],
];
const padded = (n, tile) => Math.ceil(n / tile) * tile;

// lanes of a tile [r0, r0 + h) x [c0, c0 + w) of a rows x cols matrix: inside; in a later row; past its end
function countLanes({ rows, cols, r0, c0, h, w }) {
  const inside = Math.max(0, Math.min(rows, r0 + h) - r0) * Math.max(0, Math.min(cols, c0 + w) - c0);
  let astray = 0;
  for (let r = r0; r < r0 + h; r++) {
    for (let c = Math.max(c0, r < rows ? cols : 0); c < c0 + w; c++) astray += r * cols + c < rows * cols;
  }
  return { all: h * w, inside, astray, past: h * w - inside - astray };
}

// where the lanes right of the matrix really are: pieces of later rows, as rectangles inside the matrix
function strayPlaces({ rows, cols, r0, c0, h, w }) {
  const places = [];
  for (let wrap = 1; wrap * cols < c0 + w; wrap++) {
    const from = Math.max(c0, wrap * cols) - wrap * cols, to = Math.min(c0 + w, (wrap + 1) * cols) - wrap * cols;
    const last = Math.min(r0 + h + wrap, rows);
    if (last > r0 + wrap && to > from) places.push([r0 + wrap, from, last - r0 - wrap, to - from]);
  }
  return places;
}

// bytes that all programs load and store, masked lanes left out
function bytesMoved({ M, N, K, BM, BN, itemsize }) {
  return itemsize * (M * K * Math.ceil(N / BN) + K * N * Math.ceil(M / BM) + M * N);
}

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), shapes = stage.get("shapes");
    const mark = `lanes-${Math.random().toString(36).slice(2)}`;
    const now = () => {
      const [M, N, K] = shapes[stage.get("shape")], [BM, BN, BK] = ["BM", "BN", "BK"].map(stage.get);
      const across = Math.ceil(N / BN), programs = Math.ceil(M / BM) * across, depth = Math.ceil(K / BK);
      const program = Math.min(stage.get("program"), programs - 1), step = Math.min(stage.get("step"), depth);
      const top = Math.floor(program / across) * BM, left = (program % across) * BN, k = Math.max(0, step - 1) * BK;
      const tiles = {
        A: { rows: M, cols: K, r0: top, c0: k, h: BM, w: BK },
        B: { rows: K, cols: N, r0: k, c0: left, h: BK, w: BN },
        C: { rows: M, cols: N, r0: top, c0: left, h: BM, w: BN },
      };
      const itemsize = stage.get("dtype") === "float16" ? 2 : 4;
      return {
        M, N, K, BM, BN, BK, across, programs, program, depth, step, tiles, itemsize,
        masked: stage.get("masked"), stages: stage.get("stages"),
      };
    };

    const sides = [16, 32, 64, 128];
    stage.select("shape", { label: "C = A B of", options: shapes.map(([M, N, K], i) => [i, `${M} × ${K} times ${K} × ${N}`]) });
    stage.slider("BM", { label: "tile rows BM", values: sides });
    stage.slider("BN", { label: "tile columns BN", values: sides });
    stage.slider("BK", { label: "tile depth BK", values: sides });
    const chosen = stage.slider("program", { label: "program", min: 0, max: 90, step: 1, format: () => `${now().program} of 0 to ${now().programs - 1}` });
    stage.draw(() => {
      chosen.querySelector("input").max = now().programs - 1;
      chosen.querySelector("input").value = now().program;
    });
    stage.player("step", { label: "tiles of depth taken in", max: () => now().depth, interval: 700 });
    stage.toggle("masked", { label: "mask the lanes outside" });

    stage.plot({
      interactive: true,
      height: (width) => 2 * (EDGE * zoomOf(width)) + GAP + 34,
      label: () => `Program ${now().program} owns one tile of C and has taken in ${now().step} of ${now().depth} tiles of depth; the numbers stand below`,
      draw(layer, width) {
        const state = now(), s = zoomOf(width), x1 = 16 + EDGE * s + GAP, y1 = 18 + EDGE * s + GAP;
        layer.append(hatch(mark));
        const at = { A: [x1 - GAP - padded(state.K, state.BK) * s, y1], B: [x1, y1 - GAP - padded(state.K, state.BK) * s], C: [x1, y1] };
        drawLegend(layer, state, mark);
        for (const name of "ABC") drawMatrix(layer, name, at[name], s, state, mark);
        drawGrid(layer, at.C, s, state, (program) => stage.set({ program }));
      },
    });
    stage.readout(() => story(now()));
    stage.slider("stages", { label: "stages", min: 1, max: 5, step: 1 });
    stage.select("dtype", { label: "numbers", options: ["float16", "float32"] });
    stage.plot({ height: 132, label: () => memoryWords(now()), draw: (layer, width) => drawChips(layer, width, now()) });
    stage.readout(() => memoryWords(now()));
    return stage.cleanup;
  },
};

// pixels a lane: room for a depth of 128 and 256 columns
function zoomOf(width) {
  return Math.min(1.55, (width - 18 - GAP) / (3 * EDGE));
}

function hatch(id) {
  return svgElement("defs", {}, svgElement("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svgElement("line", { x1: 0, y1: 0, x2: 0, y2: 6, stroke: color("muted"), "stroke-width": 2.4 })));
}

function drawLegend(layer, { masked }, mark) {
  const outside = masked ? { fill: `url(#${mark})`, stroke: color("muted") } : { fill: color("wrong"), "fill-opacity": 0.25, stroke: color("wrong") };
  const rows = [
    [{ fill: color("accent"), "fill-opacity": 0.85 }, "loaded now"], [{ fill: color("accent"), "fill-opacity": 0.18 }, "in the walk"],
    [{ fill: color("second"), "fill-opacity": 0.85 }, "summed up"], [outside, masked ? "masked" : "outside"],
    ...(masked ? [] : [[{ fill: color("wrong"), "fill-opacity": 0.75 }, "hit instead"]]),
  ];
  rows.forEach(([paint, words], i) => {
    layer.append(svgElement("rect", { x: 0, y: 8 + 21 * i, width: 14, height: 14, ...paint }), svgText(20, 20 + 21 * i, words));
  });
}

function drawMatrix(layer, name, [x, y], s, state, mark) {
  const { rows, cols, r0, c0, h, w } = state.tiles[name];
  const box = (r, c, tall, wide, paint) => svgElement("rect", { x: x + c * s, y: y + r * s, width: wide * s, height: tall * s, ...paint });
  layer.append(box(0, 0, rows, cols, { fill: color("panel"), stroke: color("muted") }));
  layer.append(svgText(x + 1, y - 6, `${name} ${rows} × ${cols}`));
  const tall = Math.max(0, Math.min(h, rows - r0)), wide = Math.max(0, Math.min(w, cols - c0));
  // what the whole walk reads: a band of rows of A, of columns of B
  if (name === "A") layer.append(box(r0, 0, tall, cols, { fill: color("accent"), "fill-opacity": 0.18 }));
  if (name === "B") layer.append(box(0, c0, rows, wide, { fill: color("accent"), "fill-opacity": 0.18 }));
  if (name !== "C" && state.step === 0) return;
  const share = name === "C" ? state.step / state.depth : 1;
  const outside = state.masked
    ? { fill: `url(#${mark})`, stroke: color("muted"), "stroke-dasharray": "3 2" }
    : { fill: color("wrong"), "fill-opacity": 0.25, stroke: color("wrong"), "stroke-dasharray": "3 2" };
  if (tall < h || wide < w) layer.append(box(r0, c0, h, w, outside), box(r0, c0, tall, wide, { fill: color("panel") }));
  layer.append(box(r0, c0, tall, wide, { fill: color(name === "C" ? "second" : "accent"), "fill-opacity": 0.25 + 0.6 * share }));
  if (state.masked) return;
  for (const [r, c, high, broad] of strayPlaces(state.tiles[name])) {
    layer.append(box(r, c, high, broad, { fill: color("wrong"), "fill-opacity": 0.75 }));
  }
}

function drawGrid(layer, [x, y], s, { M, N, BM, BN, across, programs, program }, choose) {
  for (let i = 0; i < programs; i++) {
    const r = Math.floor(i / across) * BM, c = (i % across) * BN, mine = i === program;
    const past = r + BM > M || c + BN > N;
    layer.append(svgElement("rect", {
      x: x + c * s, y: y + r * s, width: BN * s, height: BM * s, fill: "transparent", style: "cursor: pointer", click: () => choose(i),
      stroke: mine ? color("second") : color("muted"), "stroke-width": mine ? 2.5 : 1, "stroke-dasharray": past && !mine ? "3 3" : null,
    }));
    if (Math.min(BM, BN) * s > 24) {
      layer.append(svgText(x + (c + 4 / s) * s, y + r * s + 14, i, { class: mine ? "" : "muted", style: "pointer-events: none" }));
    }
  }
}

function needKiB(state, buffers) {
  return (buffers(state) * (state.BM + state.BN) * state.BK * state.itemsize) / 1024;
}

function drawChips(layer, width, state) {
  const x = linearScale([0, 256], [56, width - 10]);
  CHIPS.forEach(([name, limit, buffers], i) => {
    const need = needKiB(state, buffers), y = 8 + i * 28, fits = need <= limit;
    layer.append(svgText(0, y + 15, name));
    layer.append(svgElement("rect", { x: x(0), y, width: x(limit) - x(0), height: 20, fill: color("panel"), stroke: color("muted") }));
    layer.append(svgElement("rect", { x: x(0), y: fits ? y + 4 : y, width: x(Math.min(need, 256)) - x(0), height: fits ? 12 : 20, fill: fits ? color("accent") : color("wrong") }));
    layer.append(svgElement("line", { x1: x(limit), x2: x(limit), y1: y - 3, y2: y + 23, stroke: color("ink"), "stroke-width": 2 }));
    if (!fits) layer.append(svgText(x(0) + 6, y + 15, "too much", { style: `fill:${color("paper")}` }));
  });
  layer.append(axis(x, { at: 96, ticks: [0, 64, 128, 192, 256], label: "shared memory of one program, KiB" }));
}

function memoryWords(state) {
  const said = CHIPS.map(([name, limit, buffers]) => {
    const need = needKiB(state, buffers);
    return `${formatNumber(need)} KiB on ${name === "T4" ? "a" : "an"} ${name}${need > limit ? `, more than its ${limit}` : ""}`;
  });
  return `Tiles of A and B take ${said.join("; ")}.`;
}

function story(state) {
  const { M, N, K, BM, BN, programs, program, step, depth, tiles, itemsize, masked } = state;
  const all = programs * BM * BN, idle = 1 - (M * N) / all, moved = bytesMoved({ ...state });
  const rows = `${tiles.C.r0} to ${Math.min(M, tiles.C.r0 + BM) - 1}`, columns = `${tiles.C.c0} to ${Math.min(N, tiles.C.c0 + BN) - 1}`;
  const head = `${programs} program${programs === 1 ? "" : "s"}; ${formatNumber(100 * idle, 2)} % of their lanes hold no entry of C. Program ${program}: rows ${rows}, columns ${columns}. `;
  const whole = `Together they load and store ${formatUnit(moved, "B")}, ${formatNumber((2 * M * N * K) / moved)} FLOP a byte; each matrix once is ${formatUnit(itemsize * (M * K + K * N + M * N), "B")}.`;
  if (!step) return `${head}It has read nothing yet: press Step. ${whole}`;
  const reads = [tiles.A, tiles.B].map(countLanes), sum = (key) => reads.reduce((total, lanes) => total + lanes[key], 0);
  const out = sum("astray") + sum("past"), here = `Step ${step} of ${depth} loads ${formatNumber(sum("inside"))} numbers`;
  if (masked) return `${head}${here}; ${formatNumber(out)} lanes are masked. ${whole}`;
  const write = countLanes(tiles.C), bad = sum("astray"), wild = sum("past");
  const told = out ? `, ${formatNumber(bad)} from other rows and ${formatNumber(wild)} from beyond the matrices` : " and none in vain";
  const stores = write.astray + write.past ? ` Its store damages ${formatNumber(write.astray)} entries of other rows and ${formatNumber(write.past)} beyond C.` : "";
  return `${head}Without a mask, step ${step} of ${depth} loads ${formatNumber(sum("inside"))} numbers${told}.${stores}`;
}
