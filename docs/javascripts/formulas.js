// Renders the formulas of each page with KaTeX, also where pages are swapped without a reload.
(function () {
  function render() {
    document.querySelectorAll(".arithmatex").forEach(function (element) {
      var text = element.textContent.trim(); // \( formula \) or \[ formula \]
      if (/^\\[(\[]/.test(text)) {
        katex.render(text.slice(2, -2), element, {
          displayMode: text[1] === "[",
          throwOnError: false,
        });
      }
    });
  }
  if (typeof document$ === "undefined") {
    document.addEventListener("DOMContentLoaded", render);
  } else {
    document$.subscribe(render);
  }
})();
