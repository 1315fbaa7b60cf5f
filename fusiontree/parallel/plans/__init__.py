"""Which parameter is cut how over tensor parallel ranks."""
