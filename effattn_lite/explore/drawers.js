// Ten words are laid into four drawers; a softmax over the drawers answers a question about one name.

const DRAWERS = 4;

// shares of every word in every drawer after the text, [word][drawer]
function fill(rule, place, force) {
  const P = place.map(() => Array(DRAWERS).fill(0));
  place.forEach((chosen, t) => {
    for (let m = 0; m < DRAWERS; m++) {
      const logit = m === chosen ? force : 0;
      if (rule === "gsa") {
        const write = 1 / (1 + Math.exp(force / 2 - logit));
        for (let j = 0; j < t; j++) P[j][m] *= 1 - write;
        P[t][m] = write;
      } else P[t][m] = Math.exp(logit);
    }
  });
  if (rule !== "gsa") {
    for (let m = 0; m < DRAWERS; m++) {
      const total = P.reduce((sum, row) => sum + row[m], 0);
      P.forEach((row) => { row[m] /= total; });
    }
  }
  return P;
}

// the softmax over drawers of a query for one name, and the shares of the words in what it reads
function look(P, tokens, name, length) {
  const scores = P[0].map((_, m) => length * tokens.reduce((sum, [who], t) => sum + (who === name ? P[t][m] : 0), 0));
  const top = Math.max(...scores), e = scores.map((x) => Math.exp(x - top)), total = e.reduce((a, b) => a + b);
  const p = e.map((x) => x / total);
  return { p, answer: P.map((row) => row.reduce((sum, x, m) => sum + x * p[m], 0)) };
}

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), tokens = stage.get("tokens"), names = stage.get("names");
    const last = names.map((_, name) => tokens.reduce((at, [who], t) => (who === name ? t : at), 0));
    let state = null;
    stage.draw(() => {
      const P = fill(stage.get("rule"), stage.get("place"), stage.get("force"));
      const asked = names.map((_, name) => look(P, tokens, name, stage.get("length")));
      state = { P, asked, right: asked.map(({ answer }, name) => answer[last[name]] > 0.5) };
    });

    stage.select("rule", { label: "a drawer is", options: [["abc", "the mean of all words (ABC)"], ["gsa", "what its gate keeps (GSA)"]] });
    stage.select("ask", { label: "ask for", options: names.map((name, i) => [i, name]) });
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    const rules = { "By name": ([who]) => who % DRAWERS, "In rotation": (_, t) => t % DRAWERS, "All into the first": () => 0 };
    for (const [label, rule] of Object.entries(rules)) {
      const place = tokens.map(rule), there = () => place.every((m, t) => m === stage.get("place")[t]);
      stage.button({ label, disabled: there, press: () => stage.set({ place }) });
    }
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    stage.slider("force", { label: "force, nats", min: 0, max: 8, step: 0.5 });
    stage.slider("length", { label: "length of the query", min: 0, max: 40, step: 1 });

    const head = 44, row = 46, left = 16;
    const parts = (width) => {
      const grid = left + 0.5 * (width - left), bars = grid + 0.33 * (width - left);
      return { grid, bars: [grid + 8, bars], soft: [bars + 10, width - 4] };
    };
    const column = (width, t) => left + ((parts(width).grid - left) * (t + 0.5)) / tokens.length;
    const level = (m) => head + row * (m + 0.5);
    const put = (t, m) => {
      const place = [...stage.get("place")];
      place[t] = Math.max(0, Math.min(DRAWERS - 1, m));
      stage.set({ place });
    };
    const paint = (t) => {
      const name = stage.get("ask");
      if (tokens[t][0] !== name) return t % 2 ? color("line") : color("muted");
      return t === last[name] ? color("right") : color("wrong");
    };
    // a bar of the words' shares; words of the asked name last, so that they lie together
    const stack = (layer, shares, x, y, width, height) => {
      const order = tokens.map((_, t) => t).sort((a, b) => (tokens[a][0] === stage.get("ask")) - (tokens[b][0] === stage.get("ask")) || a - b);
      let at = x;
      layer.append(svgElement("rect", { x, y, width, height, fill: color("panel") }));
      for (const t of order) {
        const w = shares[t] * width;
        if (w < 0.3) continue;
        layer.append(svgElement("rect", { x: at, y, width: Math.max(0.3, w - 1), height, fill: paint(t) }));
        const words = String(tokens[t][1]);
        if (w > 10 * words.length + 4) {
          layer.append(svgText(at + w / 2, y + height / 2 + 5, words, { anchor: "middle", style: `fill:${tokens[t][0] !== stage.get("ask") && t % 2 ? color("ink") : color("paper")};font-weight:600` }));
        }
        at += w;
      }
    };

    stage.plot({
      height: head + DRAWERS * row + 58,
      label: () => "Ten words above four drawers, what every drawer holds, how the query spreads over the drawers, and the answer; the read-out below has the numbers",
      handles: tokens.map(([who, number], t) => ({
        label: `drawer of word ${t + 1}, ${names[who]} ${number}`, radius: 8, fill: color("ink"),
        at: (width) => [column(width, t), level(stage.get("place")[t])],
        move: (x, y) => put(t, Math.floor((y - head) / row)),
        nudge: (dx, dy) => put(t, stage.get("place")[t] + (dx || -dy)),
        text: () => `drawer ${stage.get("place")[t] + 1}`,
      })),
      draw(layer, width) {
        const { grid, bars, soft } = parts(width), ask = stage.get("ask"), { p, answer } = state.asked[ask], narrow = width < 520;
        const size = narrow ? "font-size:11px" : "";
        tokens.forEach(([who, number], t) => {
          const x = column(width, t), mine = who === ask;
          const look = { anchor: "middle", "font-weight": mine ? 700 : 400, style: `${size};${mine ? `fill:${t === last[ask] ? color("right") : color("wrong")}` : ""}` };
          layer.append(svgText(x, 14, narrow ? names[who][0] : names[who], look), svgText(x, 32, number, look));
          layer.append(svgElement("line", { x1: x, x2: x, y1: level(0), y2: level(DRAWERS - 1), stroke: color("line") }));
        });
        layer.append(
          svgText(bars[0], 14, narrow ? "holds" : "what it holds", { class: "muted", style: size }),
          svgText(soft[0], 14, "softmax", { class: "muted", style: size }),
        );
        for (let m = 0; m < DRAWERS; m++) {
          const y = level(m), h = row - 16;
          layer.append(
            svgElement("line", { x1: left, x2: grid, y1: y, y2: y, stroke: color("line") }),
            svgText(0, y + 5, m + 1, { class: "muted" }),
          );
          stack(layer, state.P.map((line) => line[m]), bars[0], y - h / 2, bars[1] - bars[0], h);
          layer.append(
            svgElement("rect", { x: soft[0], y: y - h / 2, width: soft[1] - soft[0], height: h, fill: color("panel") }),
            svgElement("rect", { x: soft[0], y: y - h / 2, width: Math.max(0.5, p[m] * (soft[1] - soft[0])), height: h, fill: color("accent") }),
          );
        }
        const y = head + DRAWERS * row + 22;
        layer.append(svgText(left, y - 6, `answer for ${names[ask]}: expected ${tokens[last[ask]][1]}`, { "font-weight": 600 }));
        stack(layer, answer, left, y, width - left - 4, 28);
      },
    });
    stage.append(htmlElement("p", { class: "explorable-alt" },
      "Of the name you ask for, ", htmlElement("span", { style: `color:${color("right")};font-weight:600` }, "its number now"), " and ",
      htmlElement("span", { style: `color:${color("wrong")};font-weight:600` }, "numbers it had before"), "; all other words are grey."));

    stage.readout(() => {
      const ask = stage.get("ask"), { p, answer } = state.asked[ask], best = p.indexOf(Math.max(...p));
      const heard = answer.map((x, t) => [x, t]).filter(([x]) => x > 0.05).sort((a, b) => b[0] - a[0]).slice(0, 3)
        .map(([x, t]) => `${tokens[t][1]} at ${formatNumber(x, 2)}`).join(", ");
      const good = names.filter((_, name) => state.right[name]);
      return `${names[ask]} has ${tokens[last[ask]][1]}. The query gives drawer ${best + 1} a weight of ${formatNumber(p[best], 2)} and hears ${heard || "many numbers, none above 0.05"}. `
        + `Right with more than half of the weight: ${good.length} of ${names.length}${good.length ? `, ${good.join(", ")}` : ""}.`;
    });
    return stage.cleanup;
  },
};
