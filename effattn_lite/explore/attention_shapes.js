// Softmax weights of a real query above the line, those of a linear attention below; their distance in nats.

export default {
  render({ model, el }) {
    const stage = makeStage(model, el);
    const paints = { softmax: familyColor("softmax attention"), map: familyColor("feature map") };

    const rowOf = () => stage.get("rows")[stage.get("head")][stage.get("query")];
    const fromLogs = (logs) => logs.map((x) => Math.exp(x / 100));
    const normal = (w) => { const sum = w.reduce((a, b) => a + b, 0); return { w: w.map((x) => x / sum), sum }; };
    const cosines = (n) => Array.from({ length: n }, (_, j) => Math.cos((Math.PI / 2) * ((n - 1 - j) / stage.get("reach"))));

    // weights of a choice of features, local or not
    const weights = (features, local) => {
      const row = rowOf(), n = row.softmax.length, near = local ? cosines(n) : null;
      const raw = features === "plain" ? row.plain.map((x) => x / 1000)
        : fromLogs(features === "relu" ? row.relu : row.spiky[String(stage.get("sharpness"))]);
      return normal(raw.map((x, j) => (near ? x * near[j] : x)));
    };
    const distance = (p, a) => p.reduce((s, x, j) => s + (x > 0 ? x * Math.log(x / Math.max(a[j], 1e-30)) : 0), 0);
    const spread = (p) => Math.exp(-p.reduce((s, x) => s + (x > 0 ? x * Math.log(x) : 0), 0));
    const firstOf = (p) => p.reduce((best, x, i) => (x > p[best] ? i : best), 0);

    const now = () => {
      const softmax = normal(fromLogs(rowOf().softmax)).w, mine = weights(stage.get("features"), stage.get("local"));
      const n = softmax.length, alike = softmax.map(() => 1 / n);
      const choices = [
        { words: "every key alike", w: alike },
        ...[["relu", false], ["relu", true], ["spiky", false], ["spiky", true]].map(([features, local]) => ({
          words: `${features === "relu" ? "positive" : "spiky"}${local ? " and local" : ""}`, features, local, w: weights(features, local).w,
        })),
      ].map((choice) => ({ ...choice, off: distance(softmax, choice.w), on: choice.features === stage.get("features") && choice.local === stage.get("local") }));
      return { softmax, mine: mine.w, sum: mine.sum, n, choices, key: Math.max(0, Math.min(n - 1, stage.get("key"))) };
    };

    const word = (j) => `"${stage.get("tokens")[j].trim() || " "}"`;
    const share = (x) => `${formatNumber(100 * x, 2)} %`;

    stage.select("head", { label: "head", options: stage.get("names").map((words, i) => [i, words]) });
    stage.select("query", { label: "query", options: stage.get("at").map((t, i) => [i, `${word(t)}, token ${t}`]) });
    stage.select("features", { label: "features", options: stage.get("kinds") });
    stage.toggle("local", { label: "local: times a cosine" });
    stage.slider("reach", { label: "tokens to the cosine's zero", values: stage.get("reaches") });
    stage.slider("sharpness", { label: "sharpness of the spiky features", values: stage.get("sharpnesses"), format: (x) => String(x) });

    // heights are roots of weights, or the flat rows could not be seen
    const tall = 262, middle = 132;
    const frame = (width, n) => linearScale([-0.5, Math.max(n, 2) - 0.5], [12, width - 12]);
    stage.plot({
      height: tall,
      label: () => "Weights on the tokens before the query: softmax above the line, linear attention below; heights are square roots",
      draw(layer, width) {
        const { softmax, mine, n, key } = now(), x = frame(width, n), wide = Math.max(1, ((width - 24) / n) * 0.8);
        const top = Math.max(...softmax), unit = 104 / Math.sqrt(Math.max(top, 0.15));
        const bar = (j, w, paint, down) => {
          const long = Math.min(112, unit * Math.sqrt(Math.abs(w)));
          layer.append(svgElement("rect", { x: (x(j) - wide / 2).toFixed(1), y: down ? middle : middle - long, width: wide.toFixed(1), height: Math.max(0.4, long).toFixed(1), fill: paint }));
        };
        softmax.forEach((w, j) => bar(j, w, paints.softmax, false));
        mine.forEach((w, j) => bar(j, w, w < 0 ? color("wrong") : paints.map, true));
        layer.append(
          svgElement("line", { x1: 12, x2: width - 12, y1: middle, y2: middle, stroke: color("ink") }),
          svgText(12, 14, "softmax", { "font-weight": 600 }),
          svgText(12, tall - 8, "linear", { "font-weight": 600 }),
          svgText(width - 12, tall - 8, "← older   newer", { anchor: "end", class: "muted" }),
          svgElement("line", { x1: x(key), x2: x(key), y1: 22, y2: tall - 22, stroke: color("accent"), "stroke-dasharray": "3 3" }),
          svgText(x(key), 14, word(key), { anchor: key < n * 0.15 ? "start" : key > n * 0.85 ? "end" : "middle", dx: key < n * 0.15 ? 60 : 0 }),
        );
      },
      handles: [{
        label: "key that is read out",
        at: (width) => { const { n, key } = now(); return [frame(width, n)(key), middle]; },
        move: (px, _, width) => { const { n } = now(); stage.set({ key: Math.max(0, Math.min(n - 1, Math.round(frame(width, n).invert(px)))) }); },
        nudge: (dx, dy) => { const { n, key } = now(); stage.set({ key: Math.max(0, Math.min(n - 1, key + dx + dy)) }); },
        text: () => { const { key } = now(); return `token ${key}, ${word(key)}`; },
        radius: 7,
      }],
    });

    stage.plot({
      height: 5 * 26 + 46,
      label: () => "How far each choice of features is from the softmax, in nats",
      draw(layer, width, height) {
        const { choices } = now(), left = 140, most = Math.max(1, ...choices.map((c) => c.off));
        const x = linearScale([0, most], [left, width - 52]);
        choices.forEach((choice, i) => {
          const y = 6 + 26 * i;
          layer.append(
            svgText(left - 8, y + 16, choice.words, { anchor: "end", "font-weight": choice.on ? 700 : 400 }),
            svgElement("rect", { x: left, y, width: Math.max(1, x(choice.off) - left), height: 20, fill: choice.features ? paints.map : color("muted"), "fill-opacity": choice.on ? 1 : 0.45 }),
            svgText(x(choice.off) + 6, y + 16, formatNumber(choice.off, 2), { "font-weight": choice.on ? 700 : 400 }),
          );
        });
        layer.append(axis(x, { at: height - 40, label: "distance from the softmax, nats" }));
      },
    });

    stage.readout(() => {
      const { softmax, mine, sum, n, choices, key } = now(), first = firstOf(softmax), second = firstOf(mine);
      const near = (p) => p.slice(-16).reduce((a, b) => a + b, 0);
      const plain = stage.get("features") === "plain", on = choices.find((c) => c.on);
      const theirs = `Softmax spreads ${word(n - 1)} over ${formatNumber(spread(softmax), 2)} of ${n} keys, ${share(near(softmax))} of it on the last 16; first is ${word(first)}.`;
      const ours = plain
        ? `Plain products have ${mine.filter((w) => w < 0).length} negative weights${sum < 0 ? " and a negative sum" : ""}; they are no average.`
        : `The linear attention spreads over ${formatNumber(spread(mine), 3)}, ${share(near(mine))} on the last 16; first is ${word(second)}; it is ${formatNumber(on.off, 2)} nats off.`;
      return `${theirs} ${ours} The marked key ${word(key)}: ${share(softmax[key])} and ${share(mine[key])}.`;
    });
    return stage.cleanup;
  },
};
