"""Text of the site that is taken from the code. Each function returns Markdown, and knows nothing of Sphinx."""
