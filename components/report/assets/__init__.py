"""HTML, CSS and JavaScript of the pages; read as files."""
