"use strict";
// Sorting by the column headers. The order is in the address, #sort=<table>:<column>:<direction>, so it can be linked.
(() => {
  const collator = new Intl.Collator("en", { numeric: true });

  const compare = (a, b, sign) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined); // nothing there: last
    const difference = Number(a) - Number(b);
    return sign * (Number.isNaN(difference) ? collator.compare(a, b) : difference);
  };

  function sort(table, column, direction) {
    const sign = direction === "ascending" ? 1 : -1;
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, value: row.cells[column].dataset.value }));
    rows.sort((x, y) => compare(x.value, y.value, sign) || x.row.dataset.row - y.row.dataset.row);
    body.append(...rows.map(({ row }) => row));
    for (const header of table.querySelectorAll("th[data-column]")) {
      if (Number(header.dataset.column) === column) header.setAttribute("aria-sort", direction);
      else header.removeAttribute("aria-sort");
    }
  }

  function sortFromAddress() {
    const [, id, column, direction] = /^#sort=([^:]+):(\d+):(ascending|descending)$/.exec(location.hash) ?? [];
    const table = id && document.getElementById(id);
    if (!table?.querySelector(`th[data-column="${column}"]`)) return;
    sort(table, Number(column), direction);
    table.scrollIntoView({ block: "center" });
  }

  for (const header of document.querySelectorAll("th[data-column]")) {
    header.querySelector("button").addEventListener("click", () => {
      // Numbers start with the highest, names with A.
      const first = header.classList.contains("text") ? "ascending" : "descending";
      const now = header.getAttribute("aria-sort");
      const direction = now === null ? first : now === "ascending" ? "descending" : "ascending";
      const table = header.closest("table");
      sort(table, Number(header.dataset.column), direction);
      history.replaceState(null, "", `#sort=${table.id}:${header.dataset.column}:${direction}`);
    });
  }

  const box = document.getElementById("show-published");
  box?.addEventListener("change", () => document.body.classList.toggle("ours", !box.checked));
  addEventListener("hashchange", sortFromAddress);
  sortFromAddress();
})();
