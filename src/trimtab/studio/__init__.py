"""The browser app: a strength slider whose answers and gauges follow (docs/studio.md).

Only `app.py` needs Gradio; everything that measures or writes is in the files beside it.

- `lever.py`: one user's vector, measured over the slider's range; its window and the warnings.
- `streaming.py`: greedy answers, token by token, unsteered and steered together.
- `coloring.py`: each token's projection on the direction.
- `workshop.py`: what the users share: the model, and the lock that keeps their steerings apart.
- `views.py`: all of it as HTML in which every piece of text is inert.
- `app.py`: the page.
"""
