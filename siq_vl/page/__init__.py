"""The page of `app.py`: streamed answers, where they looked in the picture, and how both are shown."""
