// The worker that holds the page's Python: it loads Pyodide, NumPy and the package, then runs one cell after another.
"use strict";

let ready = null;
let run = null;
let plots = null;

const status = (words) => postMessage({ type: "status", words });

async function load({ pyodide: base, root }) {
  importScripts(`${base}pyodide.js`);
  const python = await loadPyodide({ indexURL: base });
  status("Loading NumPy …");
  await python.loadPackage("numpy", { messageCallback: () => {} });
  const [archive, cells] = await Promise.all(["live/effattn_lite.zip", "live_cells.py"].map(async (file) => {
    const answer = await fetch(new URL(file, root));
    if (!answer.ok) throw new Error(`${file} is missing from this site`);
    return answer;
  }));
  const home = "/home/pyodide";
  python.unpackArchive(await archive.arrayBuffer(), "zip", { extractDir: home });
  python.FS.writeFile(`${home}/live_cells.py`, await cells.text());
  const module = python.pyimport("live_cells");
  module.start(new URL("live/arrays/", root).href, (item) => postMessage(item.toJs({ dict_converter: Object.fromEntries })));
  run = module.run;
  plots = module.plots;
  return python;
}

async function packages(python, code) {
  if (/\bplt\b|\bmatplotlib\b|\bplotting\.(?!style\b)/.test(code) && !python.loadedPackages.matplotlib) {
    status("Loading Matplotlib …");
    await python.loadPackage("matplotlib", { messageCallback: () => {} });
    plots();
  }
  status("Running …");
}

onmessage = async ({ data }) => {
  if (data.type === "start") {
    ready = load(data);
    ready.catch(() => {});
    return;
  }
  try {
    const python = await ready;
    await packages(python, data.code);
    postMessage({ type: "done", ok: run(data.code, data.name) });
  } catch (error) {
    postMessage({ type: "error", words: `Python could not be loaded; it needs a network the first time. (${error.message})` });
    postMessage({ type: "broken" });
  }
};
