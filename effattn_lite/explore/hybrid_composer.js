// Eight layers by letter, four times over: their cache and their work against the length, beside attention alone.

const PRESETS = [["Jamba's", "MMMMAMMM", "FEFEFEFE"], ["MiniMax-01's letters", "LLLLLLLA", "EEEEEEEE"], ["Attention alone", "AAAAAAAA", "FEFEFEFE"], ["No attention", "MMMMMMMM", "FEFEFEFE"]];
const round = (x) => formatNumber(Math.round(x));
// tokens as models are labelled: 262144 -> "256K"
const tokens = (t) => (t >= 2 ** 20 ? `${t / 2 ** 20}M` : t >= 1024 ? `${t / 1024}K` : String(t));
const billions = (x) => `${formatNumber(x / 1e9)} billion`;

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), prices = stage.get("prices"), letters = stage.get("letters"), kinds = stage.get("kinds"), repeats = stage.get("repeats");
    const nameOf = new Map(letters.map(([letter, name]) => [letter, name])), paintOf = new Map(letters.map(([letter, , family]) => [letter, familyColor(family)]));
    const inSight = (price, t) => (price.sees ? Math.min(t, price.sees) : t);
    const total = (what, key) => repeats * [...what].reduce((sum, letter) => sum + prices[letter][key], 0);
    const grown = (what, key, t) => repeats * [...what].reduce((sum, letter) => sum + prices[letter][key] + prices[letter][`${key}_token`] * inSight(prices[letter], t), 0);
    const cache = (pattern, t) => grown(pattern, "bytes", t);
    const work = (pattern, t) => grown(pattern, "flops", t) + total(stage.get("feeds"), "flops") + 2 * (stage.get("ends") / 2);
    const plain = "A".repeat(8);
    // the first length at which `cost` of the pattern is below that of attention alone
    const crossing = (cost, pattern) => {
      const less = (t) => cost(pattern, t) < cost(plain, t);
      let low = 0, high = 2 ** 26;
      if (!less(high)) return null;
      while (high - low > 1) { const mid = Math.floor((low + high) / 2); if (less(mid)) high = mid; else low = mid; }
      return high;
    };
    const now = () => {
      const pattern = stage.get("pattern"), feeds = stage.get("feeds"), t = stage.get("context");
      const weights = total(pattern + feeds, "weights") + stage.get("ends"), used = total(pattern + feeds, "used") + stage.get("ends");
      return { pattern, feeds, t, weights, used, bytes: cache(pattern, t), flops: work(pattern, t), other: cache(plain, t), otherFlops: work(plain, t), even: crossing(cache, pattern), evenFlops: crossing(work, pattern) };
    };

    // one row of buttons for mixers, one for feed-forwards; a press takes the next kind, a letter's key that kind
    const row = (key, options, words, paint) => {
      const box = stage.append(htmlElement("div", { class: "explorable-controls", style: "display:grid;grid-template-columns:repeat(8,minmax(0,1fr));gap:3px;margin:3px 0" }));
      const write = (i, letter) => { const old = stage.get(key); stage.set({ [key]: old.slice(0, i) + letter + old.slice(i + 1) }); };
      const turn = (i, by) => { const n = options.length; write(i, options[(options.indexOf(stage.get(key)[i]) + by + n) % n]); };
      const nodes = Array.from({ length: 8 }, (_, i) => htmlElement("button", {
        type: "button", click: () => turn(i, 1),
        keydown: (event) => {
          const letter = event.key.toUpperCase(), by = { ArrowUp: -1, ArrowDown: 1 }[event.key], side = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
          if (options.includes(letter)) write(i, letter);
          else if (by) { event.preventDefault(); turn(i, by); }
          else if (side) { event.preventDefault(); nodes[(i + side + 8) % 8].focus(); }
        },
      }));
      box.append(...nodes);
      stage.draw(() => nodes.forEach((node, i) => {
        const letter = stage.get(key)[i];
        node.textContent = letter;
        node.setAttribute("aria-label", `${words} of layer ${i} of 8: ${letter}, ${paint.get(letter)[1]}; press to change`);
        node.style.cssText = `padding:2px 0;font-weight:700;border-bottom:5px solid ${paint.get(letter)[0]};border-radius:4px`;
      }));
    };
    stage.append(htmlElement("p", { class: "explorable-alt" }, "Mixers of eight layers, all at Jamba's sizes: press one, or type its letter."));
    row("pattern", letters.map(([letter]) => letter), "mixer", new Map(letters.map(([letter, name]) => [letter, [paintOf.get(letter), name]])));
    stage.append(htmlElement("p", { class: "explorable-alt" }, "Feed-forwards of these layers: F one, E experts."));
    row("feeds", kinds.map(([letter]) => letter), "feed-forward", new Map(kinds.map(([letter, name]) => [letter, [color(letter === "E" ? "second" : "line"), name]])));
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    for (const [label, pattern, feeds] of PRESETS) {
      stage.button({ label, press: () => stage.set({ pattern, feeds }), disabled: () => stage.get("pattern") === pattern && stage.get("feeds") === feeds });
    }
    stage.slider("context", { label: "tokens so far", values: stage.get("lengths"), format: tokens });

    stage.plot({
      height: 74,
      label: () => `All ${8 * repeats} layers: ${stage.get("pattern")}, ${repeats} times`,
      draw(layer, width) {
        const { pattern, feeds } = now(), n = 8 * repeats, w = (width - 4) / n;
        for (let i = 0; i < n; i++) {
          const letter = pattern[i % 8], feed = feeds[i % 8], tall = letter === "A" ? 36 : letter === "W" ? 26 : 15;
          layer.append(
            svgElement("rect", { x: 2 + i * w + 0.5, y: 40 - tall, width: w - 2, height: tall, fill: paintOf.get(letter), "fill-opacity": i < 8 ? 1 : 0.55 }),
            svgElement("rect", { x: 2 + i * w + 0.5, y: 43, width: w - 2, height: feed === "E" ? 12 : 4, fill: color(feed === "E" ? "second" : "muted"), "fill-opacity": i < 8 ? 0.9 : 0.5 }),
          );
        }
        layer.append(svgText(2, 70, "layer 0", { class: "muted" }), svgText(width - 2, 70, `layer ${n - 1}`, { anchor: "end", class: "muted" }));
      },
    });

    // one plot of a cost against the length; the knob is the length
    const chart = ({ title, cost, unit, base, floor, even, extra, ticks }) => {
      const lengths = stage.get("lengths"), ends = [2 ** 6, lengths[lengths.length - 1]];
      const x = (width) => logScale(ends, [64, width - 14], 2);
      const span = () => { const { pattern } = now(); return [Math.min(floor, ...ends.map((t) => cost(pattern, t))) * 0.7, 1.5 * Math.max(cost(plain, ends[1]), cost(pattern, ends[1]))]; };
      const y = () => logScale(span(), [196, 30], base === 1024 ? 2 : 10);
      stage.plot({
        height: 238,
        label: () => `${title} against the context length, both axes logarithmic; the read-out has the numbers`,
        draw(layer, width) {
          const { pattern, t } = now(), [fx, fy] = [x(width), y()], at = Array.from({ length: 65 }, (_, i) => ends[0] * (ends[1] / ends[0]) ** (i / 64));
          layer.append(
            axis(fx, { at: 196, label: "tokens so far", ticks: width < 520 ? [2 ** 6, 2 ** 12, 2 ** 18] : [2 ** 6, 2 ** 9, 2 ** 12, 2 ** 15, 2 ** 18, 2 ** 21], format: tokens, grid: 166 }),
            axis(fy, { side: "left", at: 64, label: title, ticks: ticks.filter((v) => v > span()[0] && v < span()[1]), format: (v) => formatUnit(v, unit, base) }),
            svgLine(at.map((v) => [fx(v), fy(cost(plain, v))]), { stroke: familyColor("softmax attention"), "stroke-dasharray": "6 4" }),
            svgLine(at.map((v) => [fx(v), fy(cost(pattern, v))]), { stroke: familyColor("linear hybrid"), "stroke-width": 3 }),
            svgText(72, 70, "- - attention alone", { style: `fill:${familyColor("softmax attention")}` }),
            svgText(72, 87, "— this pattern", { style: `fill:${familyColor("linear hybrid")}` }),
          );
          if (extra) {
            const level = fy(extra());
            if (level > 30 && level < 196) layer.append(svgElement("line", { x1: 64, x2: width - 14, y1: level, y2: level, stroke: color("muted"), "stroke-dasharray": "2 4" }), svgText(72, level - 5, "the weights, 16 bits", { class: "muted" }));
          }
          const cross = even();
          if (cross && cross >= ends[0] && cross <= ends[1]) {
            const cx = fx(cross), cy = fy(cost(pattern, cross));
            layer.append(svgElement("line", { x1: cx, x2: cx, y1: cy, y2: 196, stroke: color("second"), "stroke-dasharray": "3 3" }), svgElement("circle", { cx, cy, r: 5, fill: "none", stroke: color("second"), "stroke-width": 2.5 }), svgText(cx + 8, 191, `even at ${round(cross)}`, { style: `fill:${color("second")}` }));
          }
          layer.append(svgElement("line", { x1: fx(t), x2: fx(t), y1: 30, y2: 196, stroke: color("accent"), "stroke-opacity": 0.5 }));
        },
        handles: [{
          label: `tokens so far, on the plot of ${title}`,
          at: (width) => [x(width)(stage.get("context")), y()(cost(stage.get("pattern"), stage.get("context")))],
          move: (px, _, width) => { const v = x(width).invert(px); stage.set({ context: lengths.reduce((best, n) => (Math.abs(Math.log(n / v)) < Math.abs(Math.log(best / v)) ? n : best), lengths[0]) }); },
          nudge: (dx, dy) => { const next = lengths[nearestOf(lengths, stage.get("context")) + (dx || dy)]; if (next) stage.set({ context: next }); },
          text: () => `${tokens(stage.get("context"))} tokens`,
        }],
      });
    };
    chart({ title: "bytes of the cache", cost: cache, unit: "B", base: 1024, floor: 2 ** 21, even: () => now().even, extra: () => 2 * now().weights, ticks: [20, 24, 28, 32, 36, 40].map((n) => 2 ** n) });
    chart({ title: "FLOPs of the next token", cost: work, unit: "", base: 1000, floor: 1e10, even: () => now().evenFlops, ticks: [1e10, 3e10, 1e11, 3e11, 1e12, 3e12] });

    stage.readout(() => {
      const { pattern, t, weights, used, bytes, flops, other, otherFlops, even, evenFlops } = now(), count = (letter) => repeats * [...pattern].filter((x) => x === letter).length;
      const made = letters.filter(([letter]) => count(letter)).map(([letter]) => `${count(letter)} of ${nameOf.get(letter)}`).join(", ");
      const from = (at, what) => (at == null ? `never ${what}` : at <= 1 ? `${what} from the first token` : `${what} from ${round(at)} tokens`);
      const same = pattern === plain ? " This is attention alone." : ` Than attention alone it keeps ${from(even, "less")} and computes ${from(evenFlops, "less")}.`;
      return `Layers: ${made}. ${billions(weights)} weights, ${billions(used)} of them used by a token. At ${tokens(t)} tokens the cache has ${formatUnit(bytes, "B", 1024)}, with attention alone ${formatUnit(other, "B", 1024)}; the next token takes ${formatUnit(flops, "FLOP")}, with attention alone ${formatUnit(otherFlops, "FLOP")}.${same}`;
    });
    return stage.cleanup;
  },
};
