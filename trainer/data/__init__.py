"""From labelled images, wherever they lie, to batches."""
