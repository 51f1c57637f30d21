"""Temporary loader."""
import onnxruntime as ort


class _S:
    def __init__(self, path):
        o = ort.SessionOptions()
        o.log_severity_level = 4
        self.s = ort.InferenceSession(str(path), o, providers=["CPUExecutionProvider"])

    def run(self, feeds):
        return self.s.run(None, dict(feeds))


def load(path, **_):
    return _S(path)
