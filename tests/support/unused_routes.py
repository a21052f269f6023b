"""Routes of a vLLM server that the trainer does not use, and that its guard must close."""

UNUSED = [
    ("POST", "/collective_rpc"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"), ("GET", "/metrics"),
    ("GET", "/metrics/"), ("POST", "/invocations"), ("POST", "/v1/completions"), ("GET", "/v1/models"),
    ("POST", "/v1/load_lora_adapter"), ("POST", "/update_weight_version"), ("POST", "/sleep"), ("POST", "/pause"),
    ("POST", "/scale_elastic_ep"), ("POST", "/start_profile"), ("POST", "/shutdown_weight_transfer_engine"),
    ("GET", "/version"), ("GET", "/load"), ("POST", "/tokenize"), ("GET", "/ping"), ("GET", "/weight_info"),
    ("POST", "/server_info"), ("GET", "/update_weights"), ("OPTIONS", "/update_weights"), ("HEAD", "/health"),
    ("POST", "/update_weights/"), ("POST", "//update_weights"), ("POST", "/UPDATE_WEIGHTS"), ("GET", "/"),
]  # fmt: skip
