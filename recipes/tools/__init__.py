"""What any recipe needs: command lines, files, tables, and ways to measure time and memory. It knows nothing of models."""
