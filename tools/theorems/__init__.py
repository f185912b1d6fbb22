"""The theorems of steering strength on a model of 24 tokens, where they are exact: evidence for Tilt."""
