"""The browser app: a strength slider whose answers and gauges follow (docs/studio.md).

Only `app.py` and `uploads.py` need Gradio; what measures or writes is in the files beside them.
"""
