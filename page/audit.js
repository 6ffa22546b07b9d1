// The record view and the marks. Tabulator does the table.
//
// Texts of records reach the page as textContent only, never as HTML. The rows are in the page. What a record holds comes
// from chunks, which call `records` below: they are scripts in the page, or files beside it that are loaded when needed.
"use strict";

const page = JSON.parse(document.getElementById("data").textContent);
const data = page.rows.map((row, n) => {
  const entry = { n };
  page.columns.forEach((name, i) => { entry[name] = row[i]; });
  return entry;
});
const byId = (id) => document.getElementById(id);

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

// --- chunks of records ---------------------------------------------------------------------------------------------

const chunks = new Map(); // number -> its records
const waiting = new Map(); // number -> what to call when they are there
const nonce = document.currentScript.nonce;

function records(number, list) {
  chunks.set(number, list);
  if (chunks.size > 50 && waiting.has(number)) chunks.delete(chunks.keys().next().value); // the oldest
  waiting.get(number)?.(list);
  waiting.delete(number);
}

async function chunk(number) {
  if (document.readyState === "loading") { // the chunks in the page come after this script
    await new Promise((resolve) => { document.addEventListener("DOMContentLoaded", resolve); });
  }
  if (chunks.has(number)) return chunks.get(number);
  return new Promise((resolve, reject) => {
    waiting.set(number, resolve);
    const script = element("script", { src: `records/${number}.js`, nonce });
    script.onerror = () => reject(new Error(`records/${number}.js is missing: keep the folder records beside this page`));
    script.onload = () => script.remove();
    document.head.append(script);
  });
}

// --- marks: {prompt_id and pair: {mark, note}}, kept by the browser -----------------------------------------------------

const MARKS = { k: "keep", f: "flip", d: "drop", n: "note" };
const store = `notus audit ${page.id}`;
const marks = new Map(Object.entries(storedMarks()));
const key = (entry) => `${entry.prompt_id} ${entry.pair}`;

function storedMarks() {
  try {
    return JSON.parse(localStorage.getItem(store) ?? "{}");
  } catch {
    return {}; // no storage for files in this browser; `saveMarks` says so when there is something to lose
  }
}

function setMark(entry, change) {
  const mark = { mark: "note", note: "", ...marks.get(key(entry)), ...change };
  if (change === null || (mark.mark === "note" && !mark.note)) marks.delete(key(entry));
  else marks.set(key(entry), mark);
  saveMarks();
}

function saveMarks() {
  try {
    localStorage.setItem(store, JSON.stringify(Object.fromEntries(marks)));
  } catch (error) {
    alert(`The browser cannot keep the marks (${error.name}). Download them before you close the page.`);
  }
  showMarks();
}

function showMarks() {
  for (const row of table.getRows("visible")) row.reformat(); // a repeated pair has the same mark
  countMarks();
}

// Another tab has marked something.
window.addEventListener("storage", (event) => {
  if (event.key !== store) return;
  marks.clear();
  for (const [name, mark] of Object.entries(storedMarks())) marks.set(name, mark);
  showMarks();
});

function countMarks() {
  const count = {};
  for (const { mark } of marks.values()) count[mark] = (count[mark] ?? 0) + 1;
  const each = Object.values(MARKS).filter((name) => count[name]).map((name) => `${count[name]} ${name}`);
  byId("marked").textContent = marks.size ? `${marks.size} marked: ${each.join(", ")}` : "nothing marked";
}

function downloadMarks() {
  const lines = [];
  const left = new Map(marks);
  for (const entry of data) {
    const mark = left.get(key(entry));
    if (!mark) continue;
    left.delete(key(entry));
    const { prompt_id, pair, where } = entry;
    lines.push(JSON.stringify({ prompt_id, mark: mark.mark, note: mark.note, pair, where }) + "\n");
  }
  const url = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
  element("a", { href: url, download: "marks.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

async function loadMarks(file) {
  const known = new Set(data.map(key));
  const read = new Map();
  try {
    for (const line of (await file.text()).split("\n")) {
      if (!line.trim()) continue;
      const mark = JSON.parse(line);
      if (!known.has(key(mark)) || !Object.values(MARKS).includes(mark.mark)) {
        throw new Error(`no record here has this mark: ${line.slice(0, 200)}`);
      }
      read.set(key(mark), { mark: mark.mark, note: String(mark.note ?? "") });
    }
  } catch (error) {
    alert(`${file.name} is not loaded. ${error.message}`);
    return;
  }
  for (const [name, mark] of read) marks.set(name, mark);
  saveMarks();
  if (current) show(current);
}

// --- the table -----------------------------------------------------------------------------------------------------

// A header filter whose options are plain text.
function choices(counts, all) {
  return (cell, onRendered, success) => {
    const select = element("select", { ariaLabel: `filter by ${cell.getColumn().getField()}` });
    select.append(new Option(all, ""));
    for (const [value, count] of counts) {
      const name = value || "(none)";
      select.append(new Option(count === null ? name : `${name} (${count.toLocaleString("en")})`, name));
    }
    select.addEventListener("change", () => success(select.value));
    return select;
  };
}

function countOf(field, divide = (value) => [value]) {
  const counts = new Map();
  for (const entry of data) for (const value of divide(entry[field])) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]);
}

const reasonCounts = countOf("reasons", (reasons) => reasons.split("; ")).filter(([reason]) => reason);
const same = (wanted, value) => value === (wanted === "(none)" ? "" : wanted);
const hasReason = (wanted, value) => value.includes(wanted) && `; ${value}; `.includes(`; ${wanted}; `);
const hasMark = (wanted, _, entry) => (marks.get(key(entry))?.mark ?? "(none)") === wanted;

// "3", "<2.5", ">=4", "1..2"; what is none of these lets all rows through.
function inRange(wanted, value) {
  const text = wanted.replaceAll(" ", "");
  const range = /^(-?[\d.]+)\.\.(-?[\d.]+)$/.exec(text);
  if (range) return value !== null && value >= Number(range[1]) && value <= Number(range[2]);
  const [, sign, number] = /^(<=|>=|<|>|=|)(-?[\d.]+)$/.exec(text) ?? [];
  if (number === undefined) return true;
  if (value === null) return false;
  const other = Number(number);
  return { "<": value < other, ">": value > other, "<=": value <= other, ">=": value >= other }[sign] ?? value === other;
}

const number = (title, field, width, headerTooltip) => ({
  title, field, width, headerTooltip, hozAlign: "right", sorter: "number", sorterParams: { alignEmptyValues: "bottom" },
  headerFilter: "input", headerFilterFunc: inRange, headerFilterPlaceholder: ">= 1",
  formatter: (cell) => (cell.getValue() === null ? "" : String(Math.round(cell.getValue() * 100) / 100)),
});
const chosenBy = (title, field) => ({
  title, field, width: 105, headerFilter: choices(countOf(field), "all"), headerFilterFunc: same,
});
const markColumn = {
  title: "mark", field: "mark", width: 80, headerFilterFunc: hasMark,
  headerFilter: choices([...Object.values(MARKS), ""].map((mark) => [mark, null]), "all"),
  formatter: (cell) => {
    const mark = marks.get(key(cell.getData()))?.mark ?? "";
    return mark ? element("span", { className: `mark ${mark}`, textContent: mark }) : "";
  },
  sorter: (a, b, rowA, rowB) => markOf(rowA).localeCompare(markOf(rowB)),
};
const markOf = (row) => marks.get(key(row.getData()))?.mark ?? "";

const table = new Tabulator("#table", {
  data,
  index: "n",
  height: "36vh",
  rowHeight: 30,
  layout: "fitColumns",
  selectableRows: 1,
  selectableRowsRollingSelection: true,
  keybindings: false,
  placeholder: "no record fits the filters",
  columnDefaults: { headerSortTristate: true },
  headerFilterLiveFilterDelay: 150,
  columns: [
    { title: "#", field: "n", width: 60, hozAlign: "right", sorter: "number", formatter: (cell) => String(cell.getValue() + 1) },
    markColumn,
    { title: "prompt", field: "prompt", minWidth: 150, widthGrow: 3, headerFilter: "input", headerFilterPlaceholder: "of the first 160 characters" },
    {
      title: "reasons", field: "reasons", minWidth: 140, widthGrow: 2,
      headerFilter: choices(reasonCounts, "all"), headerFilterFunc: hasReason,
    },
    { ...chosenBy("source", "source"), width: 120 },
    chosenBy("chosen", "chosen"),
    chosenBy("rejected", "rejected"),
    number("score", "score", 75, "of the chosen answer"),
    number("margin", "margin", 85, "score of the chosen answer, minus that of the rejected one"),
    number("disagreement", "disagreement", 130, "mean rating of the ratings' choice, minus that of overall_score's choice"),
    number("length", "length", 80, "characters of the chosen answer"),
    number("longer", "longer", 80, "characters of the chosen answer, minus those of the rejected one"),
  ].filter(({ field }) => field === "mark" || data.some((entry) => entry[field] !== null && entry[field] !== "")),
});

// --- the record ----------------------------------------------------------------------------------------------------

let current = null; // a Tabulator row

async function show(row) {
  current = row;
  table.deselectRow();
  row.select();
  const entry = row.getData();
  let record;
  try {
    record = (await chunk(Math.floor(entry.n / page.chunk)))[entry.n % page.chunk];
  } catch (error) {
    byId("record").replaceChildren(element("p", { className: "problem", textContent: error.message }));
    return;
  }
  if (current === row) byId("record").replaceChildren(...view(entry, record));
}

function view(entry, record) {
  const mark = marks.get(key(entry)) ?? { mark: "", note: "" };
  const flipped = mark.mark === "flip";
  const role = (i) => {
    if (i === record.chosen) return flipped ? "rejected" : "chosen";
    return i === record.rejected ? (flipped ? "chosen" : "rejected") : "";
  };
  const buttons = Object.entries(MARKS).map(([letter, name]) =>
    element(
      "button",
      { onclick: () => act(letter), ariaPressed: String(mark.mark === name), disabled: name === "flip" && !entry.pair, className: `mark ${name}` },
      `${name} `,
      element("kbd", { textContent: letter }),
    ),
  );
  buttons.push(element("button", { onclick: () => act("u") }, "unmark ", element("kbd", { textContent: "u" })));
  const note = element("input", { id: "note", value: mark.note, placeholder: "a note", ariaLabel: "note" });
  note.addEventListener("input", () => setMark(entry, { note: note.value }));
  note.addEventListener("change", () => show(current)); // the buttons show what the note has changed
  const findings = record.findings.map(([reason, detail]) => element(
    "li", { title: page.reasons[reason] ?? "" }, element("b", { textContent: reason }), detail && ` ${detail}`,
  ));
  for (const reason of entry.reasons.split("; ")) {
    if (reason && !record.findings.some(([name]) => name === reason)) {
      findings.push(element("li", { title: page.reasons[reason] }, element("b", { textContent: reason })));
    }
  }
  return [
    element("div", { className: "bar" }, ...buttons, note, element("span", { className: "where", textContent: `${entry.where}  ${entry.source}` })),
    element("ul", { className: "findings" }, ...findings),
    element("h2", { textContent: "prompt" }),
    element("pre", { className: "prompt", textContent: record.prompt }),
    element("div", { className: "answers" }, ...record.answers.map((answer, i) => answerView(answer, role(i)))),
  ];
}

function answerView(answer, role) {
  const [model, response, rating, score, aspects, critique] = ["model", "response", "rating", "overall_score", "aspects", "critique"].map((name) => answer[name]);
  const ratings = Object.entries(aspects).map(([aspect, [points]]) =>
    element("li", { className: points === "N/A" ? "absent" : "" }, `${aspect.replaceAll("_", " ")} `, element("b", { textContent: points || "none" })),
  );
  const rationales = Object.entries(aspects).filter(([, [, why]]) => why).map(([aspect, [points, why]]) =>
    element("p", {}, element("b", { textContent: `${aspect.replaceAll("_", " ")}, ${points}: ` }), why),
  );
  return element(
    "section", { className: `answer ${role}` },
    element(
      "h3", {},
      role && element("span", { className: `role ${role}`, textContent: role }),
      element("span", { textContent: model || "answer" }),
      rating === null ? "" : element("span", { title: "mean rating" }, "rating ", element("b", { textContent: String(Math.round(rating * 100) / 100) })),
      score === null ? "" : element("span", { title: "overall_score" }, "overall ", element("b", { textContent: String(score) })),
      element("span", { className: "size", textContent: `${response.length.toLocaleString("en")} characters` }),
    ),
    element("ul", { className: "ratings" }, ...ratings),
    element("pre", { textContent: response }),
    critique && element("details", { open: true }, element("summary", { textContent: "critique" }), element("p", { textContent: critique })),
    rationales.length ? element("details", {}, element("summary", { textContent: "reasons for the ratings" }), ...rationales) : "",
  );
}

// --- keys ------------------------------------------------------------------------------------------------------------

const KEYS = [
  ["↓ ↑ or j i", "next and previous record"],
  ["k", "keep the pair, and go on"],
  ["f", "flip chosen and rejected, and go on"],
  ["d", "drop the record, and go on"],
  ["n", "write a note; Esc leaves it"],
  ["u", "unmark"],
  ["Page up, Page down", "scroll the record"],
  ["/", "filter by the prompt; Tab goes on to the other filters, Esc comes back"],
  ["Tab to a column's title, then Enter", "sort by it"],
  ["?", "this window"],
];

function move(step) {
  const row = current && (step > 0 ? current.getNextRow() : current.getPrevRow());
  if (!row) return;
  const shown = row.getElement(); // in the page if it is near what can be seen
  if (shown.isConnected) shown.scrollIntoView({ block: "nearest" });
  else table.scrollToRow(row, "center").catch(() => {});
  show(row);
}

function act(letter) {
  if (!current) return;
  const entry = current.getData();
  if (letter === "n") {
    byId("note").focus();
    return;
  }
  if (letter === "f" && !entry.pair) return;
  setMark(entry, letter === "u" ? null : { mark: MARKS[letter] });
  const here = current;
  if (letter !== "u") move(1);
  if (current === here) show(current);
}

const ACTIONS = {
  ArrowDown: () => move(1), j: () => move(1), ArrowUp: () => move(-1), i: () => move(-1),
  PageDown: () => byId("record").scrollBy(0, 0.9 * byId("record").clientHeight),
  PageUp: () => byId("record").scrollBy(0, -0.9 * byId("record").clientHeight),
  "/": () => document.querySelector('[tabulator-field="prompt"] input').focus(),
  "?": () => byId("overview").showModal(),
  k: () => act("k"), f: () => act("f"), d: () => act("d"), n: () => act("n"), u: () => act("u"),
};

document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT)$/.test(event.target.tagName);
  if (typing && event.key === "Escape") {
    event.preventDefault(); // which would empty a filter
    event.stopPropagation();
    event.target.blur();
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || byId("overview").open || !ACTIONS[event.key]) return;
  event.preventDefault();
  ACTIONS[event.key]();
}, true); // before Tabulator sees the key

// --- the rest of the page --------------------------------------------------------------------------------------------

function plainTable(header, rows) {
  const row = (cells, tag) => element("tr", {}, ...cells.map((cell) => element(tag, { textContent: cell })));
  return element("table", {}, row(header, "th"), ...rows.map((cells) => row(cells, "td")));
}

function overview() {
  const counts = page.counts.map(([name, count, of]) => [
    name, count.toLocaleString("en"), of ? `${((100 * count) / of).toFixed(1)}%` : "", page.reasons[name.trim()] ?? "",
  ]);
  byId("overview").append(
    element("button", { onclick: () => byId("overview").close(), className: "close", autofocus: true }, "Close ", element("kbd", { textContent: "Esc" })),
    element("h2", { textContent: "Keys" }),
    plainTable(["key", "what it does"], KEYS),
    element("p", { textContent: "The browser keeps your marks for this data set. Download them, then: python binarize.py RAW --curation marks.jsonl. Number filters read 3, <2.5, >=4 or 1..2." }),
    element("h2", { textContent: "Counts" }),
    plainTable(["", "count", "share", "meaning"], counts),
    ...page.tables.flatMap(([header, rows]) => [element("h2", { textContent: `By ${header[0]}` }), plainTable(header, rows)]),
  );
}

// After every filter: how many rows are left, and the first of them, unless the record that is shown is among them.
function showFirst() {
  byId("shown").textContent = `${table.getDataCount("active").toLocaleString("en")} of ${data.length.toLocaleString("en")} records`;
  const first = current?.getPosition() ? null : table.getRowFromPosition(1);
  if (first) show(first);
}

table.on("tableBuilt", () => {
  for (const column of table.getColumns()) {
    const title = column.getElement().querySelector(".tabulator-col-title");
    title.tabIndex = 0;
    title.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      const [sort] = table.getSorters();
      table.setSort(column.getField(), sort?.field === column.getField() && sort.dir === "asc" ? "desc" : "asc");
    });
  }
  overview();
  countMarks();
  showFirst();
  table.on("renderComplete", showFirst); // not dataFiltered, which makes an object for every row that is left
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
});
table.on("rowClick", (_, row) => show(row));
byId("download").addEventListener("click", downloadMarks);
byId("load").addEventListener("click", () => {
  byId("file").value = ""; // or the same file, changed since, would not be read again
  byId("file").click();
});
byId("file").addEventListener("change", (event) => event.target.files[0] && loadMarks(event.target.files[0]));
byId("clear").addEventListener("click", () => {
  table.clearHeaderFilter();
  for (const select of document.querySelectorAll("#table select")) select.value = "";
});
byId("about").addEventListener("click", () => byId("overview").showModal());
