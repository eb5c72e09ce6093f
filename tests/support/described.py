"""Random values that fit a schema of our OpenAPI description."""

from typing import Any

from hypothesis import strategies as st

_TEXT = st.text(max_size=12) | st.sampled_from(["the fox", "日本", "tiny", "f", ""])
# So few optional properties at once that many requests go far.
_MAX_OPTIONAL = 8
_MAX_ITEMS = 3
_NO_RULES = {"title", "description", "default", "discriminator"}


class Described:
    """Strategies for the schemas of one description, ``components`` being its named ones."""

    def __init__(self, components: dict[str, Any]) -> None:
        self._components = components
        self._named: dict[str, st.SearchStrategy[Any]] = {}

    def values(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        """Values that fit ``schema``; fails on a keyword that it does not know."""
        rules = {key: value for key, value in schema.items() if key not in _NO_RULES}
        match rules:
            case {"$ref": reference, **rest} if not rest:
                name = reference.rpartition("/")[2]
                if name not in self._named:
                    # Deferred, since schemas may refer to themselves.
                    self._named[name] = st.deferred(lambda: self.values(self._components[name]))
                return self._named[name]
            case {"anyOf": schemas, **rest} | {"oneOf": schemas, **rest} if not rest:
                return st.one_of([self.values(s) for s in schemas])
            case {"enum": values, **rest} if not rest:
                return st.sampled_from(values)
            case {"const": value}:
                return st.just(value)
            case {"type": "null", **rest} if not rest:
                return st.none()
            case {"type": "boolean", **rest} if not rest:
                return st.booleans()
            case {"type": "string", **rest} if not rest:
                return _TEXT
            case {"type": "integer", **rest} if not rest.keys() - {"minimum", "maximum"}:
                low, high = rest.get("minimum"), rest.get("maximum")
                return st.integers(-2, 70) | st.integers(low, high)
            case {"type": "number", **rest} if not rest:
                return st.floats(-2, 2) | st.floats(allow_nan=False, allow_infinity=False)
            case {"type": "array", **rest} if not rest.keys() - {"items"}:
                items = self.values(rest["items"]) if "items" in rest else _TEXT
                return st.lists(items, max_size=_MAX_ITEMS)
            case {"type": "object", **rest} if "properties" in rest:
                return self._objects(rest)
            case {"type": "object", **rest} if not rest.keys() - {"additionalProperties"}:
                values = rest.get("additionalProperties", {})
                return st.dictionaries(_TEXT, self.values(values), max_size=_MAX_ITEMS)
            case {}:
                if not rules:
                    return st.none() | st.booleans() | st.integers() | _TEXT
        raise AssertionError(f"a keyword that this does not know: {schema}")

    def _objects(self, schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        unknown = schema.keys() - {"properties", "required", "additionalProperties"}
        assert not unknown, unknown
        properties, required = schema["properties"], schema.get("required", [])
        optional = sorted(properties.keys() - set(required))

        @st.composite
        def objects(draw: Any) -> dict[str, Any]:
            names = list(required)
            if optional:
                names += draw(st.lists(st.sampled_from(optional), max_size=_MAX_OPTIONAL))
            return {name: draw(self.values(properties[name])) for name in dict.fromkeys(names)}

        return objects()
