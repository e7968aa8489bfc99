"""Names that would run as code in a page that took them for some."""

MARKUP = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}"
TENSOR = "layers.0.</script><script>document.title='owned'</script><img src=x onerror=alert(1)>.weight"
