"""Names that would run as code in a page that took them for some, or drive a terminal that is sent them."""

MARKUP = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}"
# Colours, a title, a link, the clipboard, a bell; a line of its own, a line anew, letters the other way round; rich's.
TERMINAL = "\x1b[31mr\x1b]0;t\x07\x1b]8;;http:a\x1b\\l\x9b2J\x08\na\rb\u202egpj[red]x:warning:"
TENSOR = "layers.0.</script><script>document.title='owned'</script><img src=x onerror=alert(1)>.weight"
