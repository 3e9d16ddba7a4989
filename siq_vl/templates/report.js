"use strict";
// Filters of the gallery. Each card carries, by model: right (or null where nothing is scored), hallucinated, length.
const gallery = document.getElementById("gallery");
const cards = [...gallery.children].map((card, place) => ({ card, place, marks: JSON.parse(card.dataset.marks) }));
const chosen = (name) => document.getElementById(name).value;
const filters = {
  all: () => true,
  lost: (marks) => marks[chosen("before")][0] === true && marks[chosen("after")][0] === false,
  won: (marks) => marks[chosen("before")][0] === false && marks[chosen("after")][0] === true,
  hallucinated: (marks) => marks[chosen("after")][1],
  longest: (marks) => marks[chosen("after")][2] > 0,
};
let active = "all";

function show() {
  const domain = chosen("domain");
  const found = cards.filter(({ card, marks }) => filters[active](marks) && (!domain || card.dataset.domain === domain));
  const length = ({ marks }) => marks[chosen("after")][2];
  found.sort((a, b) => (active === "longest" && length(b) - length(a)) || a.place - b.place);
  for (const { card } of cards) card.hidden = true;
  for (const { card } of found) {
    card.hidden = false;
    gallery.append(card);
  }
  document.getElementById("count").textContent = `${found.length} of ${cards.length} questions`;
  for (const button of document.querySelectorAll("[data-filter]"))
    button.setAttribute("aria-pressed", String(button.dataset.filter === active));
}

for (const button of document.querySelectorAll("[data-filter]"))
  button.addEventListener("click", () => { active = button.dataset.filter; show(); });
for (const name of ["before", "after", "domain"]) document.getElementById(name).addEventListener("change", show);
// A link such as report.html#won opens the page with that filter on.
if (Object.hasOwn(filters, location.hash.slice(1))) active = location.hash.slice(1);
show();
