"""The drawn world: pictures of any size with exact ground truth, drawn so that they have to be looked at."""
