"""Reports: sections of paragraphs, figures and tables, and the page that shows them offline."""
