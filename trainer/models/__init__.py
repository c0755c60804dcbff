"""The classifier: backbone, head, initial weights, freezing and Grad-CAM."""
