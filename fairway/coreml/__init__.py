"""An artifact on Apple's Neural Engine: its graph, its export, what a runtime must check, and an interpreter of it."""
