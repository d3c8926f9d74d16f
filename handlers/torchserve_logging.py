"""What a TorchServe writes down, in log4j2's terms: one rolling file, and no word of a client's in it.

TorchServe's own configuration logs request lines, and exceptions whose messages quote what was sent.
"""

from __future__ import annotations

_METHODS = "GET|POST|PUT|DELETE|OPTIONS|HEAD|PATCH"
_DOORS = (
    "ping|predictions|explanations|invocations|wfpredict|models|workflows|v1|v2|token|metrics"
    "|api-description"
)
_CALLS = (
    "inference.InferenceAPIsService/(?:Ping|Predictions|StreamPredictions2?)"
    "|management.ManagementAPIsService/(?:(?:Describe|Register|Unregister)Model|ListModels"
    "|ScaleWorker|SetDefault)"
)
_KNOWN = f"(?:{_METHODS}) /(?:{_DOORS})(?![^/?: ])|gRPC org.pytorch.serve.grpc.(?:{_CALLS})(?= )"
_LINE = f'%replace{{%m}}{{(?s) "({_KNOWN})?.*" (?=[0-9]+ [0-9]+$)}}{{ $1 }}'
_THROWN_AT = "%ex{short.className} %ex{short.methodName}"

_FREQUENT = "Looping backend|Backend response time|Sending response|result=.METRICS"
_QUOTING = "\n".join(
    f'    <Logger name="org.pytorch.serve.{name}" additivity="false">'
    '<AppenderRef ref="request"/></Logger>'
    for name in ("http", "grpcimpl", "workflow", "ensemble")
)


def _appender(name: str, pattern: str) -> str:
    return f"""\
    <RollingFile name="{name}" fileName="${{log}}" filePattern="${{log}}.%i">
      <PatternLayout><Pattern>${{start}} {pattern}%n</Pattern></PatternLayout>
      <SizeBasedTriggeringPolicy size="20 MB"/>
      <DefaultRolloverStrategy max="5"/>
    </RollingFile>"""


LOGGING = f"""\
<?xml version="1.0" encoding="UTF-8"?>
<!-- What PathGuard starts TorchServe with (handlers.torchserve_logging). No line holds what a client
     chose. The (?s) are needed because a client may send what ends a line. -->
<Configuration status="error">
  <Properties>
    <Property name="log">${{sys:pathguard.log:-logs/torchserve.log}}</Property>
    <Property name="start">%d{{ISO8601}} [%-5p] %t %c -</Property>
  </Properties>
  <Appenders>
{_appender("server", "%m")}
    <!-- Of what was thrown over a request the place, not the message, which may quote it. -->
{_appender("request", f"%m {_THROWN_AT}")}
    <!-- Of a request line a known method and a known door; then status and milliseconds. -->
{_appender("access", _LINE)}
  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" additivity="false"><AppenderRef ref="access"/></Logger>
    <Logger name="io.netty" level="error" additivity="false"><AppenderRef ref="request"/></Logger>
{_QUOTING}
    <Logger name="org.apache" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <!-- What would be a line for every batch, request or metric. -->
    <Logger name="org.pytorch.serve.wlm">
      <RegexFilter regex="(?s)({_FREQUENT}).*" onMatch="DENY" onMismatch="NEUTRAL"/>
    </Logger>
    <Root level="info"><AppenderRef ref="server"/></Root>
  </Loggers>
</Configuration>
"""
