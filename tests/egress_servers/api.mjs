// A server with HTTP/2 and HTTP/1.1 over TLS (or plain HTTP/1.1) that reflects what it is sent in many ways.
// argv: certificate file, key file; or "plain". Prints its port. It ends when its stdin does.
import http2 from "node:http2";
import http from "node:http";
import fs from "node:fs";
import zlib from "node:zlib";
import crypto from "node:crypto";

const waiting = new Map(); // name -> functions to call once /go/NAME is asked for
const gone = new Set(); // names of streams whose client went away
const goneWaiting = new Map();

function credential(request) {
  const header = request.headers.authorization ?? request.headers["x-api-key"] ?? "";
  return header.replace(/^(Bearer|Basic) /, "");
}

async function handle(request, response) {
  const url = new URL(request.url, "https://server");
  const [, action, name] = url.pathname.split("/");
  const chunks = [];
  if (action !== "upload-slow") for await (const chunk of request) chunks.push(chunk);
  const body = Buffer.concat(chunks);
  const secret = credential(request);
  const json = (value, headers = {}) => {
    const text = JSON.stringify(value);
    response.writeHead(200, { "content-type": "application/json", "content-length": Buffer.byteLength(text), ...headers });
    response.end(text);
  };
  switch (action) {
    case "headers":
      return json({ version: request.httpVersion, method: request.method, url: request.url, headers: request.headers });
    case "echo":
      response.writeHead(200, { "content-type": "application/octet-stream", "x-digest": crypto.createHash("sha256").update(body).digest("hex") });
      return response.end(body);
    case "leak-body":
      return json({ plain: secret, base64: Buffer.from(`x${secret}y`).toString("base64"), hex: Buffer.from(secret).toString("hex"), url: encodeURIComponent(secret), escaped: secret });
    case "leak-header":
      return json({}, { "x-echo": `you sent ${secret}`, "set-cookie": `token=${encodeURIComponent(secret)}` });
    case "leak-split":
      response.writeHead(500, { "content-type": "text/plain" });
      for (const character of `bad key ${secret}!`) {
        await new Promise((resolve) => response.write(character, resolve));
      }
      return response.end();
    case "leak-gzip": {
      const packed = zlib.gzipSync(`zipped ${secret} zipped`);
      response.writeHead(200, { "content-encoding": "gzip", "content-length": packed.length });
      return response.end(packed);
    }
    case "leak-brotli": {
      const packed = zlib.brotliCompressSync(`zipped ${secret} zipped`);
      response.writeHead(200, { "content-encoding": "br", "content-length": packed.length });
      return response.end(packed);
    }
    case "leak-location":
      response.writeHead(302, { location: `https://elsewhere.test/?key=${encodeURIComponent(secret)}` });
      return response.end();
    case "leak-range": {
      const text = `0123456789${secret}0123456789`;
      const range = /bytes=(\d+)-(\d+)/.exec(request.headers.range ?? "");
      response.writeHead(range ? 206 : 200);
      return response.end(range ? text.slice(Number(range[1]), Number(range[2]) + 1) : text);
    }
    case "redirect":
      response.writeHead(302, { location: url.searchParams.get("to") });
      return response.end();
    case "events":
      // One event, then silence until somebody asks for /go/NAME, then another.
      response.writeHead(200, { "content-type": "text/event-stream" });
      response.write("data: first\n\n");
      waiting.set(name, () => response.end("data: second\n\n"));
      response.on("close", () => {
        gone.add(name);
        goneWaiting.get(name)?.();
      });
      return;
    case "go":
      waiting.get(name)?.();
      return json({});
    case "gone":
      // Answers once the client of /events/NAME has gone.
      if (!gone.has(name)) await new Promise((resolve) => goneWaiting.set(name, resolve));
      return json({});
    case "big": {
      response.writeHead(200, { "content-type": "application/octet-stream" });
      const piece = Buffer.alloc(65536, "v");
      for (let sent = 0; sent < Number(name); sent += piece.length) {
        if (!response.write(piece)) await new Promise((resolve) => response.once("drain", resolve));
      }
      return response.end();
    }
    case "status":
      response.writeHead(Number(name));
      return response.end();
    case "trailers":
      response.writeHead(200, { trailer: "x-sum" });
      response.write("body");
      response.addTrailers({ "x-sum": `sum of ${secret}` });
      return response.end();
    default:
      response.writeHead(404);
      response.end();
  }
}

function answer(request, response) {
  handle(request, response).catch((error) => response.destroy?.(error));
}

const [, , certificate, key] = process.argv;
const server =
  certificate === "plain"
    ? http.createServer(answer)
    : http2.createSecureServer({ cert: fs.readFileSync(certificate), key: fs.readFileSync(key), allowHTTP1: certificate !== "h2only" }, answer);
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
process.stdin.on("end", () => process.exit(0)).resume();
