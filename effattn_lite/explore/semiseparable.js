// One head's matrix over 16 tokens: the rank of a block below the diagonal, and the five steps that fill it.

const SIZE = 16;
const WIDTHS = { mask: 0, two: 2, four: 4, softmax: 4 };

// products of gates j + 1 .. t
function decay(gates, t, j) {
  let product = 1;
  for (let r = j + 1; r <= t; r++) product *= gates[r];
  return product;
}

function score(q, k, t, j, width) {
  let sum = 0;
  for (let c = 0; c < width; c++) sum += q[t][c] * k[j][c];
  return sum;
}

function matrixOf(content, gates, q, k) {
  const width = WIDTHS[content], order = [...Array(SIZE).keys()];
  return order.map((t) => {
    const row = order.map((j) => {
      if (j > t) return 0;
      if (content === "softmax") return Math.exp(score(q, k, t, j, width) / Math.sqrt(width));
      return decay(gates, t, j) * (width ? score(q, k, t, j, width) : 1);
    });
    const total = content === "softmax" ? row.reduce((a, b) => a + b) : 1;
    return row.map((x) => x / total);
  });
}

// singular values by one-sided Jacobi rotations: columns are turned until all are orthogonal
function singularValues(rows) {
  const tall = rows.length >= rows[0].length;
  const columns = tall ? rows[0].map((_, j) => rows.map((row) => row[j])) : rows.map((row) => [...row]);
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  for (let sweep = 0; sweep < 30; sweep++) {
    let turned = 0;
    for (let a = 0; a < columns.length; a++) {
      for (let b = a + 1; b < columns.length; b++) {
        const x = columns[a], y = columns[b], xx = dot(x, x), yy = dot(y, y), xy = dot(x, y);
        if (Math.abs(xy) <= 1e-15 * Math.sqrt(xx * yy) || xx * yy === 0) continue;
        turned++;
        const zeta = (yy - xx) / (2 * xy), t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
        const c = 1 / Math.hypot(1, t), s = c * t;
        columns[a] = x.map((value, i) => c * value - s * y[i]);
        columns[b] = x.map((value, i) => s * value + c * y[i]);
      }
    }
    if (!turned) break;
  }
  return columns.map((column) => Math.sqrt(dot(column, column))).sort((a, b) => b - a);
}

const rankOf = (values) => values.filter((x) => x > 1e-10 * Math.max(values[0], 1e-300)).length;

// what the reader sees of one block: its entries, singular values and factors
function blockOf({ content, gates, q, k, row, column, matrix }) {
  const rows = matrix.slice(row).map((line) => line.slice(0, column + 1)), values = singularValues(rows);
  const below = column <= row, width = WIDTHS[content], factored = below && content !== "softmax";
  const channels = width ? [...Array(width).keys()] : [null];
  const left = factored ? rows.map((_, i) => channels.map((c) => decay(gates, row + i, row) * (c === null ? 1 : q[row + i][c]))) : null;
  const right = factored ? channels.map((c) => rows[0].map((_, j) => decay(gates, row, j) * (c === null ? 1 : k[j][c]))) : null;
  return { rows, values, rank: values[0] > 0 ? rankOf(values) : 0, below, left, right };
}

function frameOf(width) {
  const side = Math.min(width - 118, 368), cell = side / SIZE;
  return { x: 34, y: 40, side, cell };
}

export default {
  render({ model, el }) {
    const stage = makeStage(model, el);
    const now = () => {
      const keys = ["content", "view", "row", "column", "chunk", "step", "token", "gates", "q", "k"];
      const state = Object.fromEntries(keys.map((key) => [key, stage.get(key)]));
      state.matrix = matrixOf(state.content, state.gates, state.q, state.k);
      return state;
    };
    const gateKey = { ...stage, get: () => stage.get("gates")[stage.get("token") - 1], set: (changes) => {
      const gates = [...stage.get("gates")];
      gates[stage.get("token") - 1] = changes.gate;
      stage.set({ gates });
    } };

    stage.select("view", { label: "show", options: stage.get("views") });
    stage.select("content", { label: "matrix", options: stage.get("contents") });
    stage.slider("token", { label: "token whose gate you set", min: 2, max: SIZE, step: 1 });
    slider(gateKey, "gate", { label: "its gate α", min: 0, max: 1, step: 0.05, format: (x) => formatNumber(x, 2) });
    stage.select("chunk", { label: "chunks of", options: [2, 4, 8] });
    stage.player("step", { label: "steps done", max: 5, interval: 1200 });
    const show = () => model.set("view", "steps");
    for (const key of ["step", "chunk"]) {
      model.on(`change:${key}`, show);
      stage.undo.push(() => model.off(`change:${key}`, show));
    }

    const clamp = (x) => Math.max(0, Math.min(SIZE - 1, x));
    const move = (row, column) => stage.set({ view: "block", row: Math.max(1, clamp(row)), column: clamp(column) });
    stage.plot({
      height: (width) => frameOf(width).side + 122,
      label: () => `Matrix of 16 by 16 entries; ${sentence(now())}`,
      draw(layer, width) {
        const state = now(), frame = frameOf(width);
        drawAxes(layer, frame);
        if (state.view === "block") drawBlock(layer, state, frame);
        else drawSteps(layer, state, frame);
        drawGate(layer, state, frame);
      },
      handles: [{
        label: "corner of the block",
        at: (width) => {
          const { x, y, cell } = frameOf(width);
          return [x + (stage.get("column") + 1) * cell, y + stage.get("row") * cell];
        },
        move: (px, py, width) => {
          const { x, y, cell } = frameOf(width);
          move(Math.round((py - y) / cell), Math.round((px - x) / cell) - 1);
        },
        nudge: (dx, dy) => move(stage.get("row") - dy, stage.get("column") + dx),
        text: () => `rows ${stage.get("row") + 1} to 16, columns 1 to ${stage.get("column") + 1}`,
        fill: color("second"),
      }],
    });

    stage.plot({
      height: 118,
      label: () => "Singular values of the block, relative to the largest",
      draw(layer, width) { drawValues(layer, now(), width); },
    });
    stage.readout(() => sentence(now()));
    return stage.cleanup;
  },
};

function drawAxes(layer, { x, y, side }) {
  layer.append(
    svgText(x + side / 2, y - 22, "written at token j", { anchor: "middle", class: "muted" }),
    svgText(0, 0, "read at token t", { anchor: "middle", class: "muted", transform: `translate(${x - 20} ${y + side / 2}) rotate(-90)` }),
    svgText(x + 2, y - 5, "1", { class: "muted" }), svgText(x + side, y - 5, "16", { anchor: "end", class: "muted" }),
  );
}

function drawBlock(layer, state, { x, y, side, cell }) {
  const { matrix, row, column } = state, block = blockOf(state);
  const inside = (i, j) => (i >= row && j <= column ? color("second") : null);
  layer.append(heatmap(matrix, { x, y, width: side, fill: familyColor("state space"), mark: inside }));
  layer.append(svgElement("rect", {
    x, y: y + row * cell, width: (column + 1) * cell, height: side - row * cell, fill: "none", stroke: color("second"), "stroke-width": 2.5,
  }));
  if (!block.left) {
    layer.append(svgText(x, y + side + 30, block.below ? "no short factors: softmax is no product" : "this block crosses the diagonal", { style: `fill:${color("wrong")}` }));
    return;
  }
  const n = block.right.length, strip = Math.max(9, Math.min(14, cell));
  layer.append(heatmap(block.left, { x: x + side + 12, y: y + row * cell, width: n * strip, height: side - row * cell, fill: color("second") }));
  layer.append(heatmap(block.right, { x, y: y + side + 12, width: (column + 1) * cell, height: n * strip, fill: color("second") }));
  layer.append(svgText(x + side + 12, y + row * cell - 6, n > 1 ? `${n} columns` : "a column"));
  layer.append(svgText(x + (column + 1) * cell + 8, y + side + 23, n > 1 ? `times ${n} rows` : "times a row"));
}

function drawSteps(layer, state, { x, y, side, cell }) {
  const { chunk, step, matrix, gates } = state, count = SIZE / chunk, width = chunk * cell;
  const own = (t, j) => Math.floor(t / chunk) === Math.floor(j / chunk), soft = state.content === "softmax";
  const seen = matrix.map((line, t) => line.map((value, j) => ((own(t, j) ? step >= 2 : step >= 5 && !soft) ? value : 0)));
  const mark = (t, j) => (own(t, j) ? familyColor("state space") : color("second"));
  const top = Math.max(...matrix.flat().map(Math.abs));
  layer.append(heatmap(seen, { x, y, width: side, mark, top }));
  for (let c = 0; c < count; c++) {
    for (let b = 0; b <= c; b++) {
      layer.append(svgElement("rect", {
        x: x + b * width, y: y + c * width, width, height: width, fill: "none",
        stroke: b === c ? familyColor("state space") : color("second"), "stroke-dasharray": b === c ? null : "3 3",
      }));
    }
  }
  if (soft) return;
  const line = (value) => [...Array(SIZE).keys()].map(value), end = (j) => (Math.floor(j / chunk) + 1) * chunk - 1;
  if (step >= 1) {
    layer.append(heatmap(line((t) => [t < chunk ? 0 : decay(gates, t, t - (t % chunk) - 1)]), { x: x + side + 8, y, width: 10, height: side, top: 1, fill: color("accent") }));
    layer.append(heatmap([line((j) => (end(j) === SIZE - 1 ? 0 : decay(gates, end(j), j)))], { x, y: y + side + 8, width: side, height: 10, top: 1, fill: color("accent") }));
  }
  drawStates(layer, { x, y, side, width, count, step });
}

// U under the chunk that writes it, S beside the chunk that reads it
function drawStates(layer, { x, y, side, width, count, step }) {
  const right = x + side + 40, low = y + side + 40, middle = (c) => (c + 0.5) * width, half = Math.min(15, width / 2 - 1);
  const box = (cx, cy, words, paint) => layer.append(
    svgElement("rect", { x: cx - half, y: cy - 11, width: 2 * half, height: 22, rx: 4, fill: color("panel"), stroke: paint, "stroke-width": 2 }),
    svgText(cx, cy + 5, words, { anchor: "middle" }),
  );
  const line = (path) => layer.append(svgElement("path", { d: path, fill: "none", stroke: color("second"), "stroke-width": 1.5 }));
  for (let c = 0; c < count - 1; c++) {
    if (step >= 4) {
      const gap = 4 + 3 * (count - 2 - c);
      line(`M${x + middle(c)} ${low + 11}V${low + 11 + gap}H${right + 15 + gap}V${y + middle(c + 1)}H${right + half}`);
      if (c) line(`M${right} ${y + middle(c) + 11}V${y + middle(c + 1) - 11}`);
      box(right, y + middle(c + 1), `S${c + 2}`, color("second"));
    }
    if (step >= 3) box(x + middle(c), low, `U${c + 1}`, color("accent"));
  }
}

function drawGate(layer, { token }, { x, y, cell }) {
  layer.append(svgElement("rect", {
    x: x + (token - 2) * cell, y: y + (token - 1) * cell, width: cell, height: cell, fill: "none", stroke: color("ink"), "stroke-width": 2,
  }));
}

function drawValues(layer, state, width) {
  const block = blockOf(state), left = 34, shown = block.values.slice(0, 8), y = linearScale([0, 1], [86, 28]);
  layer.append(axis(y, { side: "left", at: left, label: "singular values of the block, the largest = 1", ticks: [0, 1], grid: Math.min(width, 436) - left }));
  const step = (Math.min(width, 436) - left) / 8;
  shown.forEach((value, i) => {
    const share = block.values[0] > 0 ? value / block.values[0] : 0, cx = left + step * (i + 0.5);
    layer.append(svgElement("rect", { x: cx - step * 0.3, y: y(share), width: step * 0.6, height: Math.max(0, 86 - y(share)), fill: color("second") }));
    layer.append(svgText(cx, 104, share > 1e-10 ? formatNumber(share, 2) : "0", { anchor: "middle", class: "muted" }));
  });
}

function sentence(state) {
  return state.view === "block" ? blockSentence(state) : stepSentence(state);
}

function blockSentence(state) {
  const { row, column, content } = state, block = blockOf(state), n = block.rows.length, m = column + 1, rank = block.rank;
  const head = `Readers ${row + 1} to 16, writers 1 to ${m}: ${n * m} entries of rank ${rank}. `;
  if (!block.below) return `${head}The block reaches above the diagonal, where all is 0: the rule holds on and below it only.`;
  if (content === "softmax") return `${head}No state of fewer than ${rank} numbers for a value channel carries this past to this future.`;
  if (!rank) return `${head}A gate of 0 lies between: nothing of this past reaches this future.`;
  const width = WIDTHS[content] || 1, words = width === 1 ? "one column times one row" : `${width} columns times ${width} rows`;
  return `${head}It is ${words}, ${width * (n + m)} numbers: the past reaches the future through ${width === 1 ? "one number" : `${width} numbers`} for a value channel.`;
}

function stepSentence({ chunk, step, content }) {
  const count = SIZE / chunk, pairs = (SIZE * (SIZE + 1)) / 2, direct = (count * chunk * (chunk + 1)) / 2;
  if (content === "softmax") return "Softmax has no five steps: its blocks left of the diagonal are no short products. Choose another matrix.";
  const words = [
    `${count} chunks of ${chunk} tokens. Press Step.`,
    "Step 1, local decay: for every token, the gates since its chunk began (right) and until its chunk ends (below).",
    `Step 2, inside the chunks: ${direct} of the ${pairs} entries are computed as scores times mask.`,
    `Step 3, chunk states: each of the first ${count - 1} chunks sums its keys and values, faded to the chunk's end, into one matrix U.`,
    `Step 4, from chunk to chunk: S of a chunk is S of the one before, faded by that chunk's gates, plus its U. That is the recurrence, with ${count - 1} steps in place of ${SIZE - 1}.`,
    `Step 5, output: each chunk reads its S. The other ${pairs - direct} entries, in orange, act on the output, and none of them was computed.`,
  ];
  return words[step];
}
