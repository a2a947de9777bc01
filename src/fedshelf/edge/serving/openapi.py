"""The OpenAPI description of the HTTP API."""

from typing import Any

from fedshelf.edge.serving.uploads import MAX_PHOTO_BYTES

Json = dict[str, Any]


def document() -> Json:
    """The OpenAPI document, as served at `/openapi.json`."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FedShelf edge", "version": "1",
            "description": "Names the product in a photo, and takes corrections. Photos stay on this machine.",
        },
        "security": [{"token": []}],
        "paths": {
            "/v1/predict": {"post": _post(
                "Name the product in a photo.",
                {"file": _FILE}, ["file"], "Prediction", {"422": "It is not a photo that can be decoded."},
            )},
            "/v1/corrections": {"post": _post(
                "File a photo under the product that it shows, to be trained on in the store.",
                {"file": _FILE,
                 "prediction": {"type": "string", "description": "The id of a recent prediction, instead of the file."},
                 "product": {"type": "string", "maxLength": 200}},
                ["product"], "Correction",
                {"404": "The server takes no corrections, or does not remember that prediction.",
                 "422": "It is not a photo, or the product's name cannot be used.",
                 "429": "Too many corrections wait for a review.",
                 "507": "The photo cannot be written: the disk is full, for example."},
            )},
            "/v1/model": {"get": _get("Describe the model.", "Model")},
            "/v1/model.onnx": {"get": _get_file("The model file, for browsers. Only with --in-browser.")},
            "/healthz": {"get": _get("Whether the process is alive.", "Status", is_open=True)},
            "/readyz": {"get": _get("Whether the model is loaded.", "Status", is_open=True)},
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer",
                                          "description": "Needed unless the server listens on a loopback address."}},
            "schemas": _SCHEMAS,
        },
    }  # fmt: skip


_FILE: Json = {
    "type": "string",
    "contentMediaType": "image/*",
    "description": f"A photo of at most {MAX_PHOTO_BYTES >> 20} MiB.",
}
_PROBABILITY: Json = {"type": "number", "minimum": 0, "maximum": 1}
_SCHEMAS: Json = {
    "Prediction": {
        "type": "object", "required": ["id", "predictions", "sure", "model"],
        "properties": {
            "id": {"type": "string"},
            "predictions": {"type": "array", "maxItems": 5, "items": {
                "type": "object", "required": ["product", "probability"],
                "properties": {"product": {"type": "string"}, "probability": _PROBABILITY}}},
            "sure": {"type": "boolean"},
            "folder": {
                "description": "If it is not sure: the deepest folder of products that it is sure of.",
                "oneOf": [{"type": "null"}, {
                    "type": "object", "required": ["path", "probability"],
                    "properties": {"path": {"type": "string"}, "probability": _PROBABILITY}}]},
            "model": {"type": "string", "description": "SHA-256 of the model."},
        },
    },
    "Correction": {
        "type": "object", "required": ["id", "status", "product", "reason", "learned"],
        "properties": {
            "id": {"type": "string"}, "status": {"enum": ["training", "inbox", "review"]},
            "product": {"type": "string"}, "reason": {"type": "string"},
            "learned": {"type": "boolean", "description": "Whether the answers have changed by it already."},
        },
    },
    "Model": {
        "type": "object",
        "required": [
            "model", "products", "paths", "threshold", "image_size", "precision", "corrections", "learns_at_once",
            "in_browser", "card",
        ],
        "properties": {
            "model": {"type": "string"}, "products": {"type": "array", "items": {"type": "string"}},
            "paths": {"type": "array", "items": {"type": "string"}, "description": "The products with their folders."},
            "threshold": _PROBABILITY, "image_size": {"type": "integer"}, "precision": {"type": "string"},
            "corrections": {"type": "boolean"}, "card": {"type": "object"},
            "learns_at_once": {"type": "boolean", "description": "Whether a correction changes the answers at once."},
            "in_browser": {"type": "boolean", "description": "Whether browsers run the model themselves."},
        },
    },
    "Status": {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}},
    "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
}  # fmt: skip
_COMMON = {
    "401": "The token is missing or wrong.", "403": "The host name or the origin is not allowed.",
}  # fmt: skip
_OF_POST = {
    "400": "The form is malformed.", "408": "The photo arrived too slowly.", "413": "The photo is too large.",
    "415": "It is not a multipart form.", "503": "Too many requests at the same time; see Retry-After.",
}  # fmt: skip


def _post(summary: str, fields: Json, required: list[str], schema: str, errors: dict[str, str]) -> Json:
    form = {"type": "object", "required": required, "properties": fields}
    return {
        "summary": summary, "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": {"200": _answer(schema), **_errors({**_COMMON, **_OF_POST, **errors})},
    }  # fmt: skip


def _get(summary: str, schema: str, *, is_open: bool = False) -> Json:
    found: Json = {"summary": summary, "responses": {"200": _answer(schema), **_errors({} if is_open else _COMMON)}}
    return {**found, "security": []} if is_open else found


def _get_file(summary: str) -> Json:
    file = {"description": "The file.", "content": {"application/octet-stream": {}}}
    absent = {"404": "The server was started without --in-browser."}
    return {"summary": summary, "responses": {"200": file, **_errors({**_COMMON, **absent})}}


def _answer(schema: str) -> Json:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": schema, "content": content}


def _errors(errors: dict[str, str]) -> Json:
    return {status: {**_answer("Error"), "description": why} for status, why in errors.items()}
