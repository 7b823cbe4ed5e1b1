"""The data owner's side: unlearning objectives, and the training that turns a published copy into an update."""
