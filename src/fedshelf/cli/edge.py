"""The `fedshelf edge` commands: the model at the shelf."""

from fedshelf.cli.commands import Commands
from fedshelf.cli.edge_quantize import quantize

app = Commands(help="Recognize products in a store, and file the staff's corrections.")
app.command("quantize")(quantize)
