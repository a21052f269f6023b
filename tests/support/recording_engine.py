"""An engine that records the updates of its weights, for tests of what is sent without vLLM."""


class RecordingEngine:
    """Takes an update as vLLM does, whatever is in it."""

    leads = True

    def __init__(self):
        self.calls, self.tensors = [], {}

    def init_weight_transfer_engine(self, init_info):
        self.calls.append("init")

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, update_info):
        self.calls.append("update")
        if "path" in update_info:
            from safetensors.torch import load_file

            self.tensors |= load_file(update_info["path"])
        else:
            self.tensors |= {name: tensor.clone() for name, tensor in update_info["weights"]}

    def finish_weight_update(self, weight_version=None):
        self.calls.append(f"finish {weight_version}")

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True
