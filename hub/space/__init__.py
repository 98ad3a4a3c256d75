"""A Gradio Space over the zoo. The folder is the Space: push its app.py, README.md and requirements.txt."""
