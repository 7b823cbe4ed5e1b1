"""The courier on the node. Flower starts it anew for each message."""

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from .spool import exchange

app = ClientApp()


@app.query()  # type: ignore[untyped-decorator]
def carry(message: Message, context: Context) -> Message:
    """Delivers jobs and returns results. The spool folder is set in the node's own configuration."""
    asked = message.content["mail"]
    deliver = dict(zip(asked["names"], asked["jobs"], strict=True))
    results, missing = exchange(
        Path(str(context.node_config["spool"])), deliver, list(asked["wanted"]), float(asked["wait"])
    )
    record = {"names": list(results), "results": list(results.values()), "missing": missing}
    return Message(content=RecordDict({"mail": ConfigRecord(record)}), reply_to=message)
