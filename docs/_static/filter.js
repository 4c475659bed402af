// A field above each table in a container "filter": only rows that hold every typed word are shown.
addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll("div.filter")) {
    const rows = [...box.querySelectorAll("tbody tr")];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const field = document.createElement("input");
    field.className = "filter";
    field.type = "search";
    field.placeholder = `Filter ${rows.length} rows`;
    field.setAttribute("aria-label", field.placeholder);
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/);
      rows.forEach((row, k) => (row.hidden = !words.every((word) => texts[k].includes(word))));
    });
    box.prepend(field);
  }
});
