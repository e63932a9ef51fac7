"""The base of all HTML pages: colours, style sheet, and one template that pages extend."""
