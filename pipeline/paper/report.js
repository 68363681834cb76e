"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// a click on the head of a column sorts by it, first best to worst as printed, then the other way; dashes stay last
const key = (cell) => (cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value));
function sort(head) {
  const body = head.closest("table").tBodies[0], up = head.getAttribute("aria-sort") !== "ascending";
  const numeric = head.classList.contains("number"), place = head.cellIndex;
  const lines = [...body.rows].map((line) => [key(line.cells[place]), line]);
  lines.sort(([a], [b]) => {
    if (numeric) {
      const missing = (typeof a === "string") - (typeof b === "string");
      return missing || (up ? a - b : b - a) || 0;
    }
    return (up ? 1 : -1) * String(a).localeCompare(String(b), "en", { numeric: true });
  });
  all("th", head.parentElement).forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...lines.map(([, line]) => line));
}
all("th[aria-sort] button").forEach((button) => button.addEventListener("click", () => sort(button.parentElement)));

// every word that is typed must be in what stays
function filter(input, items, said = (item) => item.textContent) {
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    items.forEach((item) => {
      const text = said(item).toLowerCase();
      item.hidden = !words.every((word) => text.includes(word));
    });
  });
}
all("figure.table").forEach((figure) => all("input", figure).forEach((input) => filter(input, all("tbody tr", figure))));
filter(document.getElementById("find-run"), all("details.run"),
  (run) => all("summary, .facts", run).map((part) => part.textContent).join(" ")); // all runs have the same metrics

all("[data-show]").forEach((button) => button.addEventListener("click", () => {
  const wanted = button.dataset.show;
  all("[data-show]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
  all(".card").forEach((card) => (card.hidden = wanted !== "all" && !card.classList.contains(wanted)));
}));

// the runs of a number, over the page; without this script the link leads to the first of them in the list
const dialog = document.getElementById("dialog");
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-runs]");
  if (link && !event.ctrlKey && !event.metaKey) {
    const runs = link.dataset.runs.split(" ").map((id) => document.getElementById(`run-${id}`)).filter(Boolean);
    if (!runs.length) return;
    event.preventDefault();
    dialog.querySelector("div").replaceChildren(...runs.map((run) => {
      const copy = run.cloneNode(true);
      copy.removeAttribute("id");
      copy.hidden = false;
      copy.open = true;
      return copy;
    }));
    dialog.showModal();
    dialog.scrollTop = 0;
  }
  const copy = event.target.closest("button.copy");
  if (copy) navigator.clipboard?.writeText(copy.previousElementSibling.textContent).then(() => (copy.textContent = "copied"), () => {});
  if (event.target === dialog) dialog.close();
});
function openTarget() {
  const target = location.hash.startsWith("#run-") && document.getElementById(location.hash.slice(1));
  if (target) target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();

// what a figure says of its marks, under a pointer or a finger
const tip = document.getElementById("tip");
all(".drawing title").forEach((title) => {
  title.parentElement.dataset.said = title.textContent;
  title.remove();
});
function say(event) {
  const mark = event.target.closest?.(".drawing [data-said]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.said;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
}
addEventListener("pointermove", say);
addEventListener("pointerdown", say);
addEventListener("scroll", () => (tip.hidden = true), true);

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
