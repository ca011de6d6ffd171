// A real attention map under sinks + window: what is kept, and how far the output moves.

// base64 text to signed or unsigned bytes
function bytesOf(text, Kind) {
  return Kind.from(atob(text), (c) => c.charCodeAt(0));
}

// rows[t][j] = weight of key j for query t, 0 <= j <= t, each row summing to 1; values[j] = one vector a key
function unpackHead({ levels, values }, T, nats) {
  const level = bytesOf(levels, Uint8Array), value = bytesOf(values, Int8Array), V = value.length / T;
  const rows = Array.from({ length: T }, (_, t) => {
    const part = [...level.subarray((t * (t + 1)) / 2, ((t + 1) * (t + 2)) / 2)];
    const row = part.map((n) => Math.exp(-nats * (n / 255) ** 2)), sum = row.reduce((a, b) => a + b);
    return row.map((p) => p / sum);
  });
  return { rows, values: Array.from({ length: T }, (_, j) => value.subarray(j * V, (j + 1) * V)) };
}

// the mass that query t keeps, and |o' - o| / |o| with the kept weights brought back to a sum of 1
function underMask({ rows, values }, t, sinks, window) {
  const row = rows[t], full = new Float64Array(values[0].length), part = new Float64Array(full.length);
  let mass = 0, kept = 0;
  row.forEach((p, j) => {
    const seen = j < sinks || j > t - window;
    if (seen) { mass += p; kept += 1; }
    values[j].forEach((x, i) => { full[i] += p * x; if (seen) part[i] += p * x; });
  });
  let off = 0, size = 0;
  full.forEach((x, i) => { off += (part[i] / mass - x) ** 2; size += x * x; });
  return { mass, kept, error: Math.sqrt(off / size) };
}

// the map as a black and white picture, white where the weight is large, to be used as a mask
function pictureOf(rows) {
  const canvas = htmlElement("canvas", { width: rows.length, height: rows.length }), pen = canvas.getContext("2d");
  rows.forEach((row, t) => row.forEach((p, j) => {
    const grey = Math.round(255 * p ** 0.4);
    pen.fillStyle = `rgb(${grey},${grey},${grey})`;
    pen.fillRect(j, t, 1, 1);
  }));
  return canvas.toDataURL();
}

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), words = stage.get("words"), T = words.length;
    const heads = stage.get("heads").map((head) => unpackHead(head, T, stage.get("nats"))), pictures = heads.map((head) => pictureOf(head.rows));
    const mark = `sinks-${Math.random().toString(36).slice(2)}`;
    const now = () => ({ head: heads[stage.get("head")], t: stage.get("query"), s: stage.get("sinks"), W: stage.get("window") });
    const curve = (s) => Array.from({ length: T }, (_, t) => underMask(now().head, t, s, now().W).error);
    const median = (errors) => [...errors].sort((a, b) => a - b)[Math.floor(errors.length / 2)];
    // the first keys stand once more before the map, each strip(width) pixels
    const side = (width) => Math.min(340, Math.round((width - 80) * 0.56)), left = 46, top = 44, FIRST = 8;
    const strip = (width) => (width < 480 ? 4 : 7), mapLeft = (width) => left + FIRST * strip(width) + 10;
    const percent = (x) => (x > 0.9995 ? "all" : x < 0.0005 ? "less than 0.1 %" : `${formatNumber(100 * x, 2)} %`);
    const share = (x) => (x < 0.001 ? "less than 0.001" : formatNumber(x, 2));

    stage.select("head", { label: "head", options: stage.get("names").map((name, i) => [i, name]) });
    stage.slider("window", { label: "window W", min: 1, max: T, step: 1 });
    stage.slider("sinks", { label: "first tokens kept, s", min: 0, max: 8, step: 1 });
    stage.slider("query", { label: "query", min: 0, max: T - 1, step: 1, format: (t) => `${t}, "${words[t]}"` });

    stage.plot({
      height: (width) => top + side(width) + 46,
      label: () => `Attention map of ${stage.get("names")[stage.get("head")]} with what ${now().s} sinks and a window of ${now().W} drop, and the error of each query's output`,
      draw(layer, width) {
        const { s, W, t } = now(), m = side(width), cell = m / T, x0 = mapLeft(width), wide = strip(width);
        const key = linearScale([0, T], [x0, x0 + m]), row = linearScale([0, T], [top, top + m]);
        const picture = (x, w, columns, name) => [
          svgElement("rect", { x, y: top, width: w, height: m, fill: color("panel") }),
          svgElement("mask", { id: mark + name }, svgElement("svg", {
            x, y: top, width: w, height: m, viewBox: `0 0 ${columns} ${T}`, preserveAspectRatio: "none", style: "overflow: hidden",
          }, svgElement("image", { href: pictures[stage.get("head")], width: T, height: T, style: "image-rendering: pixelated" }))),
          svgElement("rect", { x, y: top, width: w, height: m, fill: color("accent"), mask: `url(#${mark + name})` }),
        ];
        layer.append(...picture(left, FIRST * wide, FIRST, "strip"), ...picture(x0, m, T, "map"));
        if (s + W < T) {
          const corners = [[s, s + W], [T - W, T], [s, T]].map(([j, i]) => `${key(j)},${row(i)}`).join(" ");
          layer.append(svgElement("polygon", {
            points: corners, fill: color("paper"), "fill-opacity": 0.8, stroke: color("muted"), "stroke-width": 1, "stroke-dasharray": "4 3",
          }));
          for (let j = s; j < FIRST; j++) {
            const from = Math.min(T, j + W);
            layer.append(svgElement("rect", { x: left + j * wide, y: row(from), width: wide, height: row(T) - row(from), fill: color("paper"), "fill-opacity": 0.8 }));
          }
          const free = (T - s - W) * cell;
          if (free > 90) layer.append(svgText(key(s) + free * 0.3, row(T) - free * 0.25, "dropped", { anchor: "middle", class: "muted" }));
        }
        if (s) layer.append(svgElement("rect", { x: left, y: top - 6, width: s * wide, height: 4, fill: color("second") }));
        layer.append(
          svgText(left, top - 14, "first 8", { class: "muted" }), svgText(x0 + m, top - 14, "all keys", { anchor: "end", class: "muted" }),
          svgElement("line", { x1: left, x2: x0 + m, y1: row(t + 0.5), y2: row(t + 0.5), stroke: color("second"), "stroke-width": 1.5 }),
          axis(key, { at: top + m, label: "key", ticks: 4 }), axis(row, { side: "left", at: left, label: "query", ticks: 4 }),
        );
        const x1 = x0 + m + (width < 480 ? 20 : 36), error = logScale([0.01, 30], [x1, width - 14]), clip = (e) => error(Math.min(30, Math.max(0.01, e)));
        const line = (errors) => errors.map((e, i) => [clip(e), row(i + 0.5)]);
        layer.append(
          svgLine(line(curve(0)), { stroke: color("muted"), "stroke-width": 1.5, "stroke-dasharray": "2 3" }),
          svgLine(line(curve(s)), { "stroke-width": 1.5 }),
          svgElement("line", { x1, x2: width - 14, y1: row(t + 0.5), y2: row(t + 0.5), stroke: color("second"), "stroke-width": 1.5 }),
          axis(error, { at: top + m, label: width < 480 ? "error" : "relative error of the output", ticks: width < 480 ? [0.1, 10] : [0.01, 0.1, 1, 10], grid: m }),
          svgText(x1, top - 14, width < 480 ? "⋯ s = 0" : `⋯ window alone   — s = ${s}`, { class: "muted" }),
        );
      },
      handles: [{
        label: "query", fill: color("second"), text: () => `query ${now().t}, ${words[now().t]}`,
        at: (width) => [mapLeft(width) + side(width), top + ((now().t + 0.5) / T) * side(width)],
        move: (x, y, width) => stage.set({ query: Math.max(0, Math.min(T - 1, Math.floor(((y - top) / side(width)) * T))) }),
        nudge: (dx, dy) => stage.set({ query: Math.max(0, Math.min(T - 1, now().t - dy + dx)) }),
      }],
    });

    stage.plot({
      height: 170,
      label: () => `Weights of query ${now().t} on the keys before it; those that are kept are filled`,
      draw(layer, width, height) {
        const { head, t, s, W } = now(), row = head.rows[t], { mass } = underMask(head, t, s, W);
        const key = linearScale([0, T], [left, width - 14]), bar = (p) => height - 44 - Math.sqrt(p) * (height - 74), w = Math.max(1, key(1) - key(0) - 0.5);
        row.forEach((p, j) => {
          if (p < 2e-4) return;
          const kept = j < s || j > t - W, paint = !kept ? "muted" : j < s ? "second" : "accent";
          layer.append(svgElement("rect", {
            x: key(j), y: bar(p), width: w, height: height - 44 - bar(p), fill: kept ? color(paint) : "none", stroke: color(paint), "stroke-width": kept ? 0 : 0.8,
          }));
          if (kept && p / mass > 1.05 * p) layer.append(svgElement("rect", { x: key(j) - 1, y: bar(p / mass) - 1, width: w + 2, height: 2, fill: color("ink") }));
        });
        layer.append(axis(key, { at: height - 44, label: width < 480 ? "key; hollow: dropped" : "key (filled: kept, hollow: dropped, dash: weight after the drop)", ticks: 4 }));
        for (const p of [0.01, 0.1, 0.5, 1]) {
          layer.append(svgText(left - 8, bar(p) + 4, p, { anchor: "end", class: "muted" }), svgElement("line", { x1: left, x2: width - 14, y1: bar(p), y2: bar(p), stroke: color("line"), "stroke-opacity": 0.5 }));
        }
        layer.append(svgText(0, 14, "weight", { class: "muted" }));
      },
    });

    stage.readout(() => {
      const { head, t, s, W } = now(), mine = underMask(head, t, s, W), alone = underMask(head, t, 0, W), first = Math.min(T - 1, s + W);
      const late = (errors) => share(median(errors.slice(first)));
      const one = `Query ${t}, "${words[t]}": ${mine.kept} of ${t + 1} keys are kept, with ${percent(mine.mass)} of its attention; the output moves by ${share(mine.error)} of its length`;
      const rest = s ? ` (window alone: ${percent(alone.mass)}, ${share(alone.error)})` : "";
      return `${one}${rest}. Median over the queries that drop something: ${late(curve(s))}${s ? `, window alone ${late(curve(0))}` : ""}.`;
    });
    return stage.cleanup;
  },
};
