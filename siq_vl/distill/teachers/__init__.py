"""Teachers: a local transformers model, any OpenAI-compatible server, and the scripted oracle of the drawn data set."""
