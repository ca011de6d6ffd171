// Two keys on a dial: values are single numbers, so a state is a point, and a right answer is a line.

const REACH = 2.6, RADIAN = Math.PI / 180;

const dot = ([a, b], [c, d]) => a * c + b * d;
const tidy = (x) => (Math.abs(x) < 5e-3 ? "0" : formatNumber(x, Math.abs(x) < 0.1 ? 1 : Math.abs(x) < 1 ? 2 : 3)).replace("-", "−");

export default {
  render({ model, el }) {
    const stage = makeStage(model, el);
    const paints = [color("accent"), color("right")], names = ["A", "B"];
    const delta = familyColor("delta rule"), plain = color("muted");

    const now = () => {
      const angle = stage.get("angle"), beta = stage.get("beta"), writes = stage.get("writes");
      const keys = [[1, 0], [Math.cos(angle * RADIAN), Math.sin(angle * RADIAN)]];
      const values = [stage.get("value_a"), stage.get("value_b")];
      const trail = [[0, 0]], sum = [[0, 0]];
      for (const [key, value] of writes) {
        const k = keys[key], S = trail[trail.length - 1], P = sum[sum.length - 1], step = beta * (value - dot(k, S));
        trail.push([S[0] + step * k[0], S[1] + step * k[1]]);
        sum.push([P[0] + value * k[0], P[1] + value * k[1]]);
      }
      return { angle, beta, writes, keys, values, trail, sum, S: trail[trail.length - 1], P: sum[sum.length - 1] };
    };

    stage.slider("angle", { label: "angle between the keys", min: 0, max: 180, step: 5, format: (x) => `${formatNumber(x)}°` });
    stage.slider("beta", { label: "strength β", min: 0, max: 2, step: 0.05, format: (x) => formatNumber(x) });
    ["value_a", "value_b"].forEach((key, i) => stage.slider(key, {
      label: `value of ${names[i]}`, min: -1.5, max: 1.5, step: 0.1, format: (x) => tidy(x),
    }));
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    const full = () => stage.get("writes").length >= stage.get("most");
    ["value_a", "value_b"].forEach((key, i) => stage.button({
      label: `Write ${names[i]}`, disabled: full,
      press: () => stage.set({ writes: [...stage.get("writes"), [i, stage.get(key)]] }),
    }));
    const none = () => stage.get("writes").length === 0;
    stage.button({ label: "Take back", disabled: none, press: () => stage.set({ writes: stage.get("writes").slice(0, -1) }) });
    stage.button({ label: "Empty both", disabled: none, press: () => stage.set({ writes: [] }) });

    // the dial at the left and the answers at the right, or below it on a narrow page
    const layout = (width) => {
      const wide = width >= 600, size = wide ? 312 : Math.min(width - 8, 340), left = wide ? 0 : (width - size) / 2;
      const box = wide ? { x: 362, w: width - 372, y: 44, h: 226 } : { x: 40, w: width - 52, y: size + 52, h: 150 };
      return {
        size, box, height: wide ? 322 : size + 250,
        x: linearScale([-REACH, REACH], [left, left + size]), y: linearScale([-REACH, REACH], [size + 4, 4]), left,
        direction: linearScale([-90, 270], [box.x, box.x + box.w]), read: linearScale([-REACH, REACH], [box.y + box.h, box.y]),
      };
    };
    const inside = ([a, b]) => Math.max(Math.abs(a), Math.abs(b)) <= REACH;
    // the point itself, or the place on the frame where the ray to it leaves
    const shown = (p) => { const far = Math.max(1, Math.abs(p[0]) / REACH, Math.abs(p[1]) / REACH); return [p[0] / far, p[1] / far]; };

    // both ends of { S : k . S = value } in the frame, or null
    const answers = (k, value) => {
      const across = [-k[1], k[0]];
      let low = -9, high = 9;
      for (const axis of [0, 1]) {
        const at = value * k[axis], slope = across[axis];
        if (Math.abs(slope) < 1e-9) { if (Math.abs(at) > REACH) return null; continue; }
        const ends = [(-REACH - at) / slope, (REACH - at) / slope].sort((p, q) => p - q);
        low = Math.max(low, ends[0]); high = Math.min(high, ends[1]);
      }
      return low < high ? [low, high].map((s) => [value * k[0] + s * across[0], value * k[1] + s * across[1]]) : null;
    };

    const drawDial = (layer, f, s) => {
      const at = (p) => [f.x(p[0]), f.y(p[1])];
      layer.append(
        svgElement("rect", { x: f.left, y: 4, width: f.size, height: f.size, fill: color("panel") }),
        svgElement("circle", { cx: f.x(0), cy: f.y(0), r: f.x(1) - f.x(0), fill: "none", stroke: color("line"), "stroke-width": 1.5 }),
      );
      const q = stage.get("query") * RADIAN;
      layer.append(svgLine([at([0, 0]), at([Math.cos(q), Math.sin(q)])], { stroke: color("ink"), "stroke-width": 1.5, "stroke-dasharray": "2 3" }));
      s.keys.forEach((k, i) => {
        const line = answers(k, s.values[i]);
        if (line) layer.append(svgLine(line.map(at), { stroke: paints[i], "stroke-width": 2, "stroke-dasharray": i ? "8 3 2 3" : "7 4" }));
        layer.append(svgLine([at([0, 0]), at(k)], { stroke: paints[i], "stroke-width": 3 }));
        const tag = at([1.32 * k[0], 1.32 * k[1]]);
        layer.append(svgText(tag[0], tag[1] + 5, names[i], { anchor: "middle", "font-weight": 700, fill: paints[i] }));
        if (i === 0) layer.append(svgElement("circle", { cx: f.x(k[0]), cy: f.y(k[1]), r: 6, fill: paints[0] }));
      });
      const walk = (points, paint, more) => {
        const last = points.slice(-14).map(shown);
        layer.append(svgLine(last.map(at), { stroke: paint, "stroke-width": 1.5, "stroke-opacity": 0.8, ...more }));
        last.slice(0, -1).forEach((p) => layer.append(svgElement("circle", { cx: at(p)[0], cy: at(p)[1], r: 2.5, fill: paint })));
      };
      walk(s.sum, plain, { "stroke-dasharray": "3 3" });
      walk(s.trail, delta, {});
      const point = (p, paint, square) => {
        const [x, y] = at(shown(p)), out = !inside(p);
        layer.append(square
          ? svgElement("rect", { x: x - 6, y: y - 6, width: 12, height: 12, fill: out ? "none" : paint, stroke: paint, "stroke-width": 2 })
          : svgElement("circle", { cx: x, cy: y, r: 7, fill: out ? "none" : paint, stroke: paint, "stroke-width": 2 }));
      };
      point(s.P, plain, true);
      point(s.S, delta, false);
      layer.append(
        svgElement("circle", { cx: f.left + 12, cy: f.size - 24, r: 6, fill: delta }), svgText(f.left + 24, f.size - 20, "correcting"),
        svgElement("rect", { x: f.left + 6, y: f.size - 14, width: 12, height: 12, fill: plain }), svgText(f.left + 24, f.size - 3, "adding"),
      );
    };

    const drawReads = (layer, f, s) => {
      const { box } = f, bottom = box.y + box.h;
      layer.append(
        axis(f.direction, { at: bottom, label: "direction of the query, degrees from A", ticks: [-90, 0, 90, 180, 270], grid: box.h }),
        axis(f.read, { side: "left", at: box.x, label: "", ticks: [-2, -1, 0, 1, 2], grid: box.w }),
        svgText(box.x, box.y - 20, "what a query reads"),
      );
      const grid = Array.from({ length: 121 }, (_, i) => -90 + 3 * i);
      const curve = (p) => grid.map((d) => {
        const r = dot(p, [Math.cos(d * RADIAN), Math.sin(d * RADIAN)]);
        return [f.direction(d), Math.abs(r) <= REACH ? f.read(r) : NaN];
      });
      layer.append(svgLine(curve(s.P), { stroke: plain, "stroke-dasharray": "5 4" }), svgLine(curve(s.S), { stroke: delta, "stroke-width": 2.5 }));
      s.keys.forEach((k, i) => {
        const x = f.direction(i ? s.angle : 0), [read, sum] = [dot(k, s.S), dot(k, s.P)];
        layer.append(svgElement("line", { x1: x, x2: x, y1: box.y, y2: bottom, stroke: paints[i], "stroke-width": 1.5, "stroke-dasharray": i ? "8 3 2 3" : "7 4" }));
        layer.append(svgText(x + (i && s.angle < 15 ? 12 : 0), box.y - 3, names[i], { anchor: "middle", "font-weight": 700, fill: paints[i] }));
        layer.append(svgElement("circle", { cx: x, cy: f.read(s.values[i]), r: 8, fill: "none", stroke: paints[i], "stroke-width": 2.5 }));
        if (Math.abs(sum) <= REACH) layer.append(svgElement("rect", { x: x - 4, y: f.read(sum) - 4, width: 8, height: 8, fill: plain }));
        if (Math.abs(read) <= REACH) layer.append(svgElement("circle", { cx: x, cy: f.read(read), r: 4.5, fill: delta }));
      });
      const x = f.direction(stage.get("query"));
      layer.append(svgElement("line", { x1: x, x2: x, y1: box.y, y2: bottom, stroke: color("ink"), "stroke-width": 1.5, "stroke-dasharray": "2 3" }));
    };

    const bounded = (x, low, high) => Math.max(low, Math.min(high, x));
    const turn = (x) => stage.set({ angle: bounded(Math.round(x), 0, 180) });
    const ask = (x) => stage.set({ query: bounded(Math.round(x), -90, 270) });
    stage.plot({
      height: (width) => layout(width).height,
      label: () => "Dial with two keys, the lines of right answers and the states of two memories; beside it what a query of each direction reads",
      draw(layer, width) { const f = layout(width), s = now(); drawDial(layer, f, s); drawReads(layer, f, s); },
      handles: [
        {
          label: "key B on the dial",
          at: (width) => { const f = layout(width), k = now().keys[1]; return [f.x(k[0]), f.y(k[1])]; },
          move: (px, py, width) => {
            const f = layout(width), degrees = Math.atan2(f.y.invert(py), f.x.invert(px)) / RADIAN;
            turn(degrees < -90 ? 180 : degrees);
          },
          nudge: (dx, dy) => turn(stage.get("angle") + 5 * (dy || -dx)),
          text: () => `${stage.get("angle")} degrees from A`,
          fill: paints[1],
        },
        {
          label: "direction of the query",
          at: (width) => { const f = layout(width); return [f.direction(stage.get("query")), f.box.y + f.box.h]; },
          move: (px, py, width) => ask(layout(width).direction.invert(px)),
          nudge: (dx, dy) => ask(stage.get("query") + 5 * (dx || dy)),
          text: () => `${stage.get("query")} degrees from A`,
          fill: color("ink"), radius: 7,
        },
      ],
    });

    stage.readout(() => {
      const s = now(), count = s.writes.length, [a, b] = s.keys, d = stage.get("query"), overlap = dot(a, b);
      const q = [Math.cos(d * RADIAN), Math.sin(d * RADIAN)], pull = s.beta * (s.values[1] - dot(b, s.S)) * overlap;
      const told = count ? `After ${count} ${count === 1 ? "write" : "writes"}` : "With nothing written";
      return `${told}, keys ${s.angle}° apart, β = ${formatNumber(s.beta)}: the correcting memory reads ${tidy(dot(a, s.S))} under A ` +
        `(true: ${tidy(s.values[0])}) and ${tidy(dot(b, s.S))} under B (true: ${tidy(s.values[1])}); ` +
        `the adding one ${tidy(dot(a, s.P))} and ${tidy(dot(b, s.P))}. Writing B now would move A's answer by ${tidy(pull)}. ` +
        `A query at ${String(d).replace("-", "−")}° reads ${tidy(dot(q, s.S))} and ${tidy(dot(q, s.P))}.`;
    });
    return stage.cleanup;
  },
};
