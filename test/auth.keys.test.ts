/** Auth0's signing keys at fault: each test first makes the fault happen, then looks at what users see of it. */
import assert from "node:assert/strict";
import type { ServerResponse } from "node:http";
import { after, afterEach, before, beforeEach, test } from "node:test";
import type { TestContext } from "node:test";
import { createAuthenticator } from "../auth.ts";
import { logOf, post, startServer } from "./support/server.ts";
import type { RunningServer } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";
import type { Tenant } from "./support/tenant.ts";

const MINUTE = 60_000;

let tenant: Tenant;
let server: RunningServer;
let hanging: ServerResponse[];

before(async () => {
  tenant = await startTenant();
});

after(() => tenant.close());

beforeEach(async () => {
  hanging = [];
  tenant.answerJwks = undefined;
  server = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "info" }); // knows no key yet
});

afterEach(async () => {
  hanging.forEach((response) => response.destroy());
  await server.close();
});

const signed = (claims = {}) => tenant.sign({ aud: server.url, ...claims });

const call = (token: string) => post(server.url, token, "ping");

const statusOf = async (token: string) => (await call(token)).status;

/** Stops the clock, and gives back what moves it on. */
function stopClock(t: TestContext): (milliseconds: number) => void {
  let now = Date.now();
  t.mock.timers.enable({ apis: ["Date"], now });
  return (milliseconds) => t.mock.timers.setTime(now += milliseconds);
}

const fail = (response: ServerResponse) => response.writeHead(500).end();

const FAULTS: Record<string, (response: ServerResponse) => void> = {
  "status 500": fail,
  "HTML with status 200": (response) => response.end("<!doctype html><title>Sorry</title>"),
  "no keys": (response) => response.end('{"keys":[]}'),
  "JSON that is no key set": (response) => response.end('{"keys":"none"}'),
  "null": (response) => response.end("null"),
  "more than 64 KiB": (response) =>
    response.end(JSON.stringify({ keys: [{ kty: "RSA", n: "x".repeat(70_000) }] })),
  "a redirect": (response) => response.writeHead(302, { location: "/elsewhere" }).end(),
  "a connection that is cut": (response) => response.destroy(),
  "half an answer": (response) => {
    response.writeHead(200, { "content-length": 1000 });
    response.write("{", () => response.destroy());
  },
};

for (const [fault, answer] of Object.entries(FAULTS)) {
  test(`without a key, ${fault} from Auth0 is a 503 and never a 401, and good keys are taken at once`, async (t) => {
    const log = logOf(t);
    tenant.answerJwks = answer;
    const token = await signed();
    const reply = await call(token);
    assert.equal(reply.status, 503);
    assert.match(reply.headers.get("retry-after") ?? "", /^\d+$/);
    assert.equal(reply.headers.get("www-authenticate"), null);
    assert.match(log.join(""), new RegExp(` 503 .*${tenant.issuer}\\.well-known/jwks\\.json.*: .+`));
    assert.doesNotMatch(log.join(""), /\n {4}at /);

    tenant.answerJwks = undefined;
    assert.equal(await statusOf(token), 200);
  });
}

test("Auth0 that cannot be reached is a 503", async (t) => {
  const gone = await startTenant();
  const lonely = await startServer({ AUTH0_DOMAIN: gone.origin });
  t.after(lonely.close);
  const token = await gone.sign({ aud: lonely.url });
  await gone.close();
  const reply = await fetch(lonely.url, { method: "POST", headers: { authorization: `Bearer ${token}` } });
  assert.equal(reply.status, 503);
});

test("Auth0 that does not answer, or stops in the middle, is a 503 in a few seconds", async () => {
  tenant.answerJwks = (response) => {
    if (hanging.push(response) % 2 === 0) response.write('{"keys":[');
  };
  const token = await signed();
  assert.equal(await statusOf(token), 503);
  assert.equal(await statusOf(token), 503);
});

test("many first calls at once ask Auth0 once", async () => {
  const before = tenant.jwksRequests;
  const tokens = await Promise.all(Array.from({ length: 20 }, (_, n) => signed({ jti: n })));
  assert.deepEqual(new Set(await Promise.all(tokens.map(statusOf))), new Set([200]));
  assert.equal(tenant.jwksRequests - before, 1);
});

test("known keys serve for an hour while Auth0 fails, with a warning a minute at most, and then no longer", async (t) => {
  const log = logOf(t);
  const pass = stopClock(t);
  assert.equal(await statusOf(await signed()), 200);
  tenant.answerJwks = fail;
  const warnings = () => log.filter((line) => line.includes("going on with keys")).length;

  pass(6 * MINUTE);
  assert.equal(await statusOf(await signed()), 200);
  assert.equal(warnings(), 1);
  for (let n = 0; n < 5; n++) {
    pass(2_000);
    assert.equal(await statusOf(await signed()), 200);
  }
  assert.equal(warnings(), 1);

  pass(58 * MINUTE);
  assert.equal(await statusOf(await signed()), 200);
  assert.equal(warnings(), 2);

  pass(2 * MINUTE);
  assert.equal(await statusOf(await signed()), 503);
});

test("in a known outage nobody waits for Auth0", async (t) => {
  const pass = stopClock(t);
  assert.equal(await statusOf(await signed()), 200);
  tenant.answerJwks = fail;
  pass(6 * MINUTE);
  assert.equal(await statusOf(await signed()), 200);
  tenant.answerJwks = (response) => void hanging.push(response); // from now on it does not even fail
  pass(5_000);
  assert.equal(await statusOf(await signed()), 200);
  assert.ok(
    hanging.length > 0 && hanging.every((response) => !response.destroyed),
    "it is still being asked",
  );
});

test("fresh keys are taken as soon as they can be had", async (t) => {
  const pass = stopClock(t);
  assert.equal(await statusOf(await signed()), 200);
  tenant.answerJwks = fail;
  pass(6 * MINUTE);
  assert.equal(await statusOf(await signed()), 200);

  await tenant.rotateKeys({ withdraw: true });
  tenant.answerJwks = undefined;
  pass(2_000);
  assert.equal(await statusOf(await signed()), 200, "signed with the new key");
});

test("a withdrawn key is refused within ten minutes, whatever is remembered", async (t) => {
  const pass = stopClock(t);
  const token = await signed();
  assert.equal(await statusOf(token), 200);
  await tenant.rotateKeys({ withdraw: true });
  // In use all the time, so that it is remembered all the time.
  for (let minute = 1; minute < 10; minute++) {
    pass(MINUTE);
    await statusOf(token);
  }
  pass(MINUTE);
  assert.equal(await statusOf(token), 401);
});

test("a new key is found seconds after the keys were read, and the old one goes on", async (t) => {
  const pass = stopClock(t);
  const old = await signed();
  assert.equal(await statusOf(old), 200);
  await tenant.rotateKeys();
  pass(6_000);
  assert.equal(await statusOf(await signed()), 200);
  assert.equal(await statusOf(old), 200);
});

test("a flood of made-up keys is no flood of requests to Auth0, even while it fails", async (t) => {
  const pass = stopClock(t);
  assert.equal(await statusOf(await signed()), 200);
  const flood = async () => {
    const before = tenant.jwksRequests;
    for (let n = 0; n < 50; n++) {
      const token = await tenant.sign({ aud: server.url }, { header: { kid: `made-up-${n}` } });
      assert.ok([401, 503].includes(await statusOf(token)));
    }
    return tenant.jwksRequests - before;
  };
  assert.equal(await flood(), 0);
  pass(6_000);
  assert.equal(await flood(), 1);
  tenant.answerJwks = fail;
  pass(6_000);
  assert.equal(await flood(), 1);
});

test("a refused token is not remembered as refused", async (t) => {
  const pass = stopClock(t);
  const token = await signed({ nbf: Math.floor(Date.now() / 1000) + 60 });
  assert.equal(await statusOf(token), 401);
  pass(MINUTE);
  assert.equal(await statusOf(token), 200);
});

test("a verified token is remembered for a minute, never past its expiry, and ten thousand of them at most", async (t) => {
  const pass = stopClock(t);
  const authenticate = createAuthenticator({ issuer: tenant.issuer, audience: server.url, warn: () => {} });
  // With every signature good, ten thousand tokens need not be signed; how often it is asked is what counts here.
  const { mock } = t.mock.method(crypto.subtle, "verify", () => Promise.resolve(true));
  const [header, payload = ""] = (await signed()).split(".");
  const claims = JSON.parse(Buffer.from(payload, "base64url").toString());
  const token = (jti: number, exp: number = claims.exp) =>
    `Bearer ${header}.${Buffer.from(JSON.stringify({ ...claims, jti, exp })).toString("base64url")}.AAAA`;
  const isVerified = async (authorization: string) => {
    const before = mock.callCount();
    await authenticate(authorization);
    return mock.callCount() > before;
  };

  assert.equal(await isVerified(token(0)), true);
  pass(59_000);
  assert.equal(await isVerified(token(0)), false);
  pass(2_000);
  assert.equal(await isVerified(token(0)), true);

  const brief = token(1, Math.floor(Date.now() / 1000) + 30);
  assert.equal(await isVerified(brief), true);
  pass(32_000);
  assert.equal(await isVerified(brief), true); // within the tolerance between clocks, but checked again
  pass(10_000);
  await assert.rejects(isVerified(brief), { message: /expired/ });

  for (let n = 2; n < 10_002; n++) await authenticate(token(n));
  assert.equal(await isVerified(token(10_001)), false);
  assert.equal(await isVerified(token(0)), true, "the oldest have made room");
});
