// Tables marked `sortable` sort by a column when its heading is pressed; the page reads the same without this.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      const body = table.tBodies[0];
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last either way
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return ascending ? order : -order;
      };
      body.append(...[...body.rows].sort(compare));
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    });
  });
}
// On paper everything is open; links into closed parts open them.
const closed = () => [...document.querySelectorAll("details:not([open])")];
const opened = [];
addEventListener("beforeprint", () => {
  opened.push(...closed());
  opened.forEach((part) => (part.open = true));
});
addEventListener("afterprint", () => opened.splice(0).forEach((part) => (part.open = false)));
const reveal = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target) { (target.closest("details") ?? target).open = true; target.scrollIntoView(); }
};
addEventListener("hashchange", reveal);
reveal();
