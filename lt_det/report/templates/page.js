"use strict";
const DATA = JSON.parse(document.getElementById("page-data").textContent);

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  Object.assign(node, attributes);
  node.append(...children);
  return node;
}

const DIGITS = {float1: 1, float2: 2, float3: 3, signed1: 1};

function shown(value, kind) {
  if (value === null || value === undefined) return "–";
  if (kind === "int") return value.toLocaleString("en");
  if (kind in DIGITS) return (kind === "signed1" && value > 0 ? "+" : "") + value.toFixed(DIGITS[kind]);
  return String(value);
}

function buildTable(place, table) {
  const {keys, headings, kinds, values} = table;
  const count = values.length ? values[0].length : 0;
  let sortColumn = keys.indexOf(table.sort.replace(/^-/, "")), descending = table.sort.startsWith("-");
  let all = false, group = "";
  const groupColumn = kinds.indexOf("group");
  const body = element("tbody"), head = element("tr"), status = element("span");
  const search = element("input", {type: "search", placeholder: "search", ariaLabel: "search"});
  const more = element("button", {type: "button"});

  headings.forEach((heading, column) => {
    const cell = element("th", {className: kinds[column], title: "sort"});
    cell.addEventListener("click", () => {
      // Text ascends at first, numbers descend.
      descending = column === sortColumn ? !descending : !["text", "group"].includes(kinds[column]);
      sortColumn = column;
      update();
    });
    head.append(cell);
  });

  function chosen() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const texts = keys.map((_, column) => column).filter(column => kinds[column] === "text");
    let rows = [...Array(count).keys()].filter(row =>
      (!group || values[groupColumn][row] === group) &&
      words.every(word => texts.some(column => String(values[column][row] ?? "").toLowerCase().includes(word))));
    if (sortColumn >= 0) {
      const column = values[sortColumn], sign = descending ? -1 : 1;
      // What is missing stands last whatever the direction.
      rows.sort((a, b) => {
        const x = column[a] ?? null, y = column[b] ?? null;
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
      });
    }
    return rows;
  }

  function update() {
    const rows = chosen(), part = all ? rows : rows.slice(0, table.shown);
    [...head.children].forEach((cell, column) => {
      cell.textContent = headings[column] + (column === sortColumn ? (descending ? " ▾" : " ▴") : "");
    });
    body.replaceChildren(...part.map(row => element("tr", {}, ...keys.map((_, column) => {
      const value = values[column][row], kind = kinds[column];
      const cell = element("td", {className: kind});
      if (kind === "group" && value) cell.append(element("span", {className: `badge g${value}`}, GROUPS[value]));
      else cell.textContent = shown(value, kind);
      return cell;
    }))));
    status.textContent = `${part.length.toLocaleString("en")} of ${count.toLocaleString("en")} rows`;
    more.hidden = rows.length <= table.shown;
    more.textContent = all ? `show ${table.shown}` : `show all ${rows.length.toLocaleString("en")}`;
  }

  const tools = element("div", {className: "tools"});
  if (table.search) {
    search.addEventListener("input", update);
    tools.append(search);
    if (groupColumn >= 0) {
      ["", "r", "c", "f"].forEach(letter => {
        const button = element("button", {type: "button", className: letter ? "" : "on"}, GROUPS[letter]);
        button.addEventListener("click", () => {
          group = letter;
          tools.querySelectorAll("button.on").forEach(other => other.classList.remove("on"));
          button.classList.add("on");
          update();
        });
        tools.append(button);
      });
    }
  }
  more.addEventListener("click", () => { all = !all; update(); });
  if (table.search || count > table.shown) tools.append(status, more);
  if (table.file) {
    const save = element("button", {type: "button"}, "save csv");
    save.addEventListener("click", () => {
      const quote = value => value === null || value === undefined ? "" :
        /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value);
      const lines = [keys, ...chosen().map(row => keys.map((_, column) => values[column][row]))];
      const file = new Blob([lines.map(line => line.map(quote).join(",")).join("\n") + "\n"], {type: "text/csv"});
      const link = element("a", {href: URL.createObjectURL(file), download: table.file});
      link.click();
      URL.revokeObjectURL(link.href);
    });
    tools.append(save);
  }
  if (tools.children.length) place.append(tools);
  place.append(element("div", {className: "scroll"}, element("table", {}, element("thead", {}, head), body)));
  update();
}

let plotly = null;

// Plotly's script stands compressed in the page, and runs when the first chart is drawn.
function needPlotly() {
  plotly ??= (async () => {
    const text = atob(document.getElementById("plotly").textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const script = new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
    document.head.append(element("script", {textContent: await script.text()}));
  })();
  return plotly;
}

const begun = new Set();

async function draw(place) {
  if (begun.has(place)) return;
  begun.add(place);
  await needPlotly();
  const figure = DATA.charts[place.id];
  await Plotly.newPlot(place, figure.data, figure.layout, {displaylogo: false, responsive: true, modeBarButtons: [["toImage", "resetScale2d"]]});
  place.dataset.drawn = "yes";
}

const painted = () => new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve)));
const idle = () => new Promise(resolve => (globalThis.requestIdleCallback ?? setTimeout)(() => resolve()));

(async () => {
  const page = document.documentElement.dataset, now = () => Math.round(performance.now());
  const places = [...document.querySelectorAll(".chart, .table")];
  // What is in view first. A table moves what is below it, hence one after the other.
  let next = 0;
  const charts = [];
  for (; next < places.length && places[next].getBoundingClientRect().top < innerHeight; next++) {
    const place = places[next];
    if (place.id in DATA.tables) buildTable(place, DATA.tables[place.id]);
    else charts.push(place);
  }
  page.readableMs = now();
  await painted();  // text and tables are seen before Plotly is started, which takes longer than all else
  for (const place of charts) await draw(place);
  page.openedMs = now();
  // The other tables when there is time, the other charts when they come near.
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (entry.isIntersecting) { observer.unobserve(entry.target); draw(entry.target); }
    }
  }, {rootMargin: "600px"});
  for (const place of places.slice(next)) {
    if (place.id in DATA.tables) {
      await idle();
      buildTable(place, DATA.tables[place.id]);
    } else observer.observe(place);
  }
  addEventListener("beforeprint", () => places.filter(place => place.id in DATA.charts).forEach(draw));
})();
