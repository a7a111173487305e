"use strict";
// A click on a column's head sorts its table: first the largest numbers or the first names, then the other way round.
// Numbers are compared as data-value has them, unrounded; empty cells come last either way.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const text = head.classList.contains("text");
    const now = head.getAttribute("aria-sort");
    const down = text ? now === "ascending" : now !== "descending";
    for (const other of head.parentNode.children) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const key = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [key(one), key(other)];
      if (a === "" || b === "") return (a === "") - (b === "");
      const difference = Number(a) - Number(b);
      return sign * (text || Number.isNaN(difference) ? a.localeCompare(b, undefined, { numeric: true }) : difference);
    });
    body.append(...rows);
  });
}
