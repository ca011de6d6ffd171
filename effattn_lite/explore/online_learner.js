// One token's problem in the plane: loss and distance, and where four rules step.

const REACH = 2.4, FLOOR = -2, CEILING = 6;
const RULES = ["inner", "gradient", "implicit", "channels"];
const NAMES = { inner: "adding", gradient: "gradient step", implicit: "implicit step", channels: "Longhorn" };

const dot = ([a, b], [c, d]) => a * c + b * d;
const tidy = (x) => (Math.abs(x) < 5e-3 ? "0" : formatNumber(x, Math.abs(x) < 0.1 ? 1 : Math.abs(x) < 1 ? 2 : 3)).replace("-", "−");

export default {
  render({ model, el }) {
    const stage = makeStage(model, el);
    const paints = { inner: color("muted"), gradient: familyColor("delta rule"), implicit: familyColor("online learning"), channels: color("right") };

    // where a rule goes from P, which is what the token keeps of the state
    const stepOf = (rule, P, k, v, beta) => {
      const size = dot(k, k), soft = beta / (1 + beta * size), error = v - dot(k, P);
      if (rule === "inner") return P.map((x, i) => x + beta * v * k[i]);
      if (rule === "channels") return P.map((x, i) => (1 - soft * k[i] * k[i]) * x + soft * v * k[i]);
      return P.map((x, i) => x + (rule === "gradient" ? beta : soft) * error * k[i]);
    };
    const now = () => {
      const count = stage.get("token"), beta = stage.get("strength"), keep = stage.get("keep"), truth = stage.get("truth");
      const trails = Object.fromEntries(RULES.map((rule) => [rule, [[0, 0]]]));
      let k = null, v = 0;
      for (let t = 0; t < count; t++) {
        const angle = stage.get("angles")[t], r = t % 3 === 2 ? stage.get("length") : 1;
        k = [r * Math.cos(angle), r * Math.sin(angle)];
        v = dot(k, truth);
        for (const rule of RULES) {
          const kept = trails[rule].at(-1).map((x) => keep * x);
          trails[rule].push(stepOf(rule, kept, k, v, beta));
        }
      }
      const rule = stage.get("rule"), trail = trails[rule], before = count ? trail.at(-2).map((x) => keep * x) : [0, 0];
      const landed = k ? Object.fromEntries(RULES.map((name) => [name, dot(k, stepOf(name, before, k, v, beta))])) : null;
      const far = Object.fromEntries(RULES.map((name) => [name, Math.hypot(...trails[name].at(-1).map((x, i) => x - truth[i]))]));
      return { count, beta, keep, truth, rule, trails, trail, before, k, v, landed, far };
    };
    let s = null;
    stage.draw(() => { s = now(); });

    stage.select("rule", { label: "rule", options: RULES.map((rule) => [rule, NAMES[rule]]) });
    stage.slider("strength", { label: "strength β", values: [0.125, 0.25, 0.5, 1, 1.5, 2, 3, 4, 8, 16] });
    stage.slider("length", { label: "length of every third key", min: 1, max: 4, step: 0.25 });
    stage.slider("keep", { label: "share α kept", min: 0.5, max: 1, step: 0.05 });
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    stage.player("token", { label: "tokens told", max: () => stage.get("angles").length, interval: 700 });

    // the plane at the left, the cut at the right or below it on a narrow page
    const layout = (width) => {
      const wide = width >= 600, size = wide ? 300 : Math.min(width - 8, 330), left = wide ? 0 : (width - size) / 2;
      const box = wide ? { x: 350, w: width - 362, y: 34, h: 232 } : { x: 30, w: width - 42, y: size + 66, h: 190 };
      return {
        size, left, box, height: wide ? size + 30 : size + 66 + 190 + 50,
        x: linearScale([-REACH, REACH], [left, left + size]), y: linearScale([-REACH, REACH], [size + 4, 4]),
        read: linearScale([-5, 5], [box.x, box.x + box.w]), cost: linearScale([FLOOR, CEILING], [box.y + box.h, box.y]),
      };
    };
    // the point itself, or where the ray to it leaves the frame
    const shown = (p) => { const far = Math.max(1, Math.abs(p[0]) / REACH, Math.abs(p[1]) / REACH); return [p[0] / far, p[1] / far]; };
    // both ends of { S : k . S = value } in the frame, or null
    const across = (k, value) => {
      const size = dot(k, k), foot = k.map((x) => (x * value) / size), along = [-k[1], k[0]];
      let low = -20, high = 20;
      for (const i of [0, 1]) {
        if (Math.abs(along[i]) < 1e-9) { if (Math.abs(foot[i]) > REACH) return null; continue; }
        const ends = [(-REACH - foot[i]) / along[i], (REACH - foot[i]) / along[i]].sort((p, q) => p - q);
        low = Math.max(low, ends[0]); high = Math.min(high, ends[1]);
      }
      return low < high ? [low, high].map((z) => [foot[0] + z * along[0], foot[1] + z * along[1]]) : null;
    };
    const mark = (layer, rule, x, y, hollow, radius = 6) => {
      const style = { fill: hollow ? color("panel") : paints[rule], stroke: paints[rule], "stroke-width": 2 };
      if (rule === "inner") layer.append(svgElement("rect", { x: x - radius + 1, y: y - radius + 1, width: 2 * radius - 2, height: 2 * radius - 2, ...style }));
      else if (rule === "channels") layer.append(svgElement("path", { d: `M${x} ${y - radius - 1}L${x + radius + 1} ${y + radius - 1}H${x - radius - 1}Z`, ...style }));
      else if (rule === "gradient") layer.append(svgElement("path", { d: `M${x} ${y - radius - 1}l${radius + 1} ${radius + 1}l${-radius - 1} ${radius + 1}l${-radius - 1} ${-radius - 1}Z`, ...style }));
      else layer.append(svgElement("circle", { cx: x, cy: y, r: radius, ...style }));
    };

    const drawPlane = (layer, f) => {
      const at = (p) => [f.x(p[0]), f.y(p[1])];
      layer.append(svgElement("rect", { x: f.left, y: 4, width: f.size, height: f.size, fill: color("panel") }));
      if (s.k) {
        // equal steps of the loss on both sides of the valley
        for (const level of [0.25, 1, 2, 4, 8]) {
          for (const side of [-1, 1]) {
            const line = across(s.k, s.v + side * Math.sqrt(2 * level));
            if (line) layer.append(svgLine(line.map(at), { stroke: color("line"), "stroke-width": 1.5 }));
          }
        }
        const floor = across(s.k, s.v);
        if (floor) layer.append(svgLine(floor.map(at), { stroke: color("accent"), "stroke-width": 2.5, "stroke-dasharray": "7 4" }));
        layer.append(svgLine([at([0, 0]), at(shown(s.k))], { stroke: color("ink"), "stroke-width": 2 }));
        const tip = at(shown(s.k));
        layer.append(svgElement("circle", { cx: tip[0], cy: tip[1], r: 3, fill: color("ink") }));
      }
      const walk = s.trail.slice(-9).map(shown);
      layer.append(svgLine(walk.map(at), { stroke: paints[s.rule], "stroke-opacity": 0.8 }));
      walk.slice(0, -1).forEach((p) => layer.append(svgElement("circle", { cx: at(p)[0], cy: at(p)[1], r: 2.5, fill: paints[s.rule] })));
      const order = [...RULES.filter((rule) => rule !== s.rule), s.rule];
      for (const rule of order) {
        const p = s.trails[rule].at(-1), [x, y] = at(shown(p)), out = Math.max(...p.map(Math.abs)) > REACH;
        mark(layer, rule, x, y, out, rule === s.rule ? 8 : 5);
      }
      layer.append(svgText(f.left, f.size + 22, s.k ? "valley of the last token's loss; to drag: the hidden map" : "nothing told yet; to drag: the hidden map", { class: "muted" }));
    };

    const drawCut = (layer, f) => {
      const { box } = f, bottom = box.y + box.h;
      layer.append(
        svgElement("rect", { x: box.x, y: box.y, width: box.w, height: box.h, fill: color("panel") }),
        axis(f.read, { at: bottom, label: "what the key reads", ticks: [-4, -2, 0, 2, 4], grid: box.h }),
        axis(f.cost, { side: "left", at: box.x, label: "", ticks: [0, 2, 4, 6], grid: box.w }),
        svgText(box.x, box.y - 12, s.k ? "a cut along the key" : "tell a token: then its problem is here"),
      );
      if (!s.k) return;
      const size = dot(s.k, s.k), r0 = dot(s.k, s.before), grid = Array.from({ length: 201 }, (_, i) => -5 + i / 20);
      const distance = (x) => (x - r0) ** 2 / (2 * size), loss = (x) => (s.beta * (x - s.v) ** 2) / 2;
      const told = {
        inner: (x) => -s.beta * s.v * (x - r0), gradient: (x) => loss(r0) + s.beta * (r0 - s.v) * (x - r0), implicit: loss, channels: loss,
      }[s.rule];
      const curve = (g) => grid.map((x) => { const y = g(x); return [f.read(x), y >= FLOOR && y <= CEILING ? f.cost(y) : NaN]; });
      layer.append(
        svgLine(curve(distance), { stroke: color("muted"), "stroke-dasharray": "3 4" }),
        svgLine(curve(told), { stroke: color("accent"), "stroke-dasharray": "7 4" }),
        svgLine(curve((x) => told(x) + distance(x)), { stroke: paints[s.rule], "stroke-width": 3 }),
      );
      const ends = [["was", r0, color("muted"), r0 < s.v], ["told", s.v, color("accent"), r0 >= s.v]];
      for (const [word, x, paint, first] of ends.filter(([, y]) => Math.abs(y) <= 5)) {
        layer.append(
          svgElement("line", { x1: f.read(x), x2: f.read(x), y1: bottom - 14, y2: bottom, stroke: paint, "stroke-width": 4 }),
          svgText(f.read(x) + (first ? -5 : 5), bottom - 4, word, { anchor: first ? "end" : "start" }),
        );
      }
      for (const rule of [...RULES.filter((name) => name !== s.rule), s.rule]) {
        const x = s.landed[rule], held = Math.max(-5, Math.min(5, x)), y = (rule === s.rule ? told(x) : loss(x)) + distance(x);
        const height = rule === s.rule ? f.cost(Math.max(FLOOR, Math.min(CEILING, y))) : box.y + 12;
        mark(layer, rule, f.read(held), height, held !== x, rule === s.rule ? 8 : 5);
      }
    };

    const place = ([a, b]) => stage.set({ truth: [a, b].map((x) => Math.max(-2, Math.min(2, Math.round(x * 20) / 20))) });
    stage.plot({
      height: (width) => layout(width).height,
      label: () => "Plane of states with the valley of the last token's loss and the walk of one rule; beside it the loss, the distance and their sum along the key",
      draw(layer, width) { const f = layout(width); drawPlane(layer, f); drawCut(layer, f); },
      handles: [{
        label: "the hidden map",
        at: (width) => { const f = layout(width), p = stage.get("truth"); return [f.x(p[0]), f.y(p[1])]; },
        move: (px, py, width) => { const f = layout(width); place([f.x.invert(px), f.y.invert(py)]); },
        nudge: (dx, dy) => { const p = stage.get("truth"); place([p[0] + 0.1 * dx, p[1] + 0.1 * dy]); },
        text: () => stage.get("truth").map(tidy).join(" and "),
        fill: color("second"), radius: 8,
      }],
    });

    // which mark and line is what
    stage.plot({
      height: (width) => (width >= 600 ? 54 : 112),
      label: () => "Legend: adding is a square, a gradient step a diamond, an implicit step a circle, Longhorn a triangle",
      draw(layer, width) {
        const wide = width >= 600, columns = wide ? 4 : 2, step = (width - 12) / columns;
        RULES.forEach((rule, i) => {
          const x = 12 + (i % columns) * step, y = 14 + Math.floor(i / columns) * 26;
          mark(layer, rule, x, y, false, 6);
          layer.append(svgText(x + 14, y + 5, NAMES[rule], rule === s.rule ? { "font-weight": 700 } : {}));
        });
        const lines = [["loss, as the rule sees it", color("accent"), "7 4", 2], ["distance from the old state", color("muted"), "3 4", 2], ["their sum", paints[s.rule], null, 3]];
        lines.forEach(([words, paint, dash, thick], i) => {
          const x = wide ? [2, 2 + 1.5 * step, 2 + 3 * step][i] : [2, 2, 2 + step * 1.3][i], y = wide ? 42 : [68, 94, 68][i];
          layer.append(svgLine([[x, y], [x + 26, y]], { stroke: paint, "stroke-width": thick, ...(dash ? { "stroke-dasharray": dash } : {}) }), svgText(x + 34, y + 5, words));
        });
      },
    });

    stage.readout(() => {
      const far = RULES.map((rule) => `${NAMES[rule]} ${tidy(s.far[rule])}`).join(", ");
      if (!s.k) return `Nothing told yet; the hidden map is ${s.truth.map(tidy).join(" and ")}. All four states are 0.`;
      const read = dot(s.k, s.before);
      return `Token ${s.count}: a key of length ${tidy(Math.sqrt(dot(s.k, s.k)))}, value ${tidy(s.v)}, β = ${formatNumber(s.beta)}; kept of the state: ${formatNumber(s.keep)}. ` +
        `The key read ${tidy(read)}. ${NAMES[s.rule][0].toUpperCase()}${NAMES[s.rule].slice(1)} makes it read ${tidy(s.landed[s.rule])}; ` +
        `an implicit step from there would make it ${tidy(s.landed.implicit)}. Distance from the hidden map (${s.truth.map(tidy).join(" and ")}): ${far}.`;
    });
    return stage.cleanup;
  },
};
