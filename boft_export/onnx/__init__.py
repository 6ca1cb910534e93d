"""ONNX: graphs traced without weights, filled with folded ones, and proven in ONNX Runtime."""
