/** Auth0's signing keys at fault: each test first makes the fault happen, then looks at what users see of it. */
import assert from "node:assert/strict";
import type { ServerResponse } from "node:http";
import { after, afterEach, before, beforeEach, test } from "node:test";
import type { TestContext } from "node:test";
import { createAuthenticator, describeError } from "../auth.ts";
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
  t.after(() => t.mock.timers.reset()); // which Deno leaves to the test
  return (milliseconds) => t.mock.timers.setTime(now += milliseconds);
}

const fail = (response: ServerResponse) => response.writeHead(500).end();

const FAULTS: Record<string, (response: ServerResponse) => void> = {
  "status 500": fail,
  "HTML with status 200": (response) => response.end("<!doctype html><title>Sorry</title>"),
  "JSON that is no key set": (response) => response.end('{"keys":"none"}'),
  "null": (response) => response.end("null"),
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

test("what went wrong is told for each address that was tried", () => {
  const refused = ["::1", "127.0.0.1"].map((address) => new Error(`connect ECONNREFUSED ${address}`));
  const failure = new TypeError("fetch failed", { cause: new AggregateError(refused) });
  assert.equal(describeError(failure), "fetch failed: connect ECONNREFUSED ::1, connect ECONNREFUSED 127.0.0.1");
});

test("Auth0 that cannot be reached is a 503", async (t) => {
  const gone = await startTenant();
  const lonely = await startServer({ AUTH0_DOMAIN: gone.origin });
  t.after(lonely.close);
  const token = await gone.sign({ aud: lonely.url });
  await gone.close();
  assert.equal((await post(lonely.url, token, "ping")).status, 503);
});

test("Auth0 that does not answer, or stops in the middle, is a 503 in a few seconds", async (t) => {
  const { timeout } = AbortSignal;
  const { mock } = t.mock.method(AbortSignal, "timeout", () => timeout(50)); // in place of those seconds
  const token = await signed();
  for (const start of ["", '{"keys":[']) {
    tenant.answerJwks = (response) => {
      hanging.push(response);
      if (start !== "") response.write(start);
    };
    assert.equal(await statusOf(token), 503);
  }
  for (const { arguments: [milliseconds] } of mock.calls) assert.ok(Number(milliseconds) <= 5_000);
  assert.ok(mock.callCount() > 0);
});

test("a key set without keys is a 503 and never a 401, and good keys are taken seconds later", async (t) => {
  const pass = stopClock(t);
  const token = await signed();
  for (let n = 0; n < 2; n++) { // at first, and in place of keys that were there
    tenant.answerJwks = (response) => response.end('{"keys":[]}');
    assert.equal(await statusOf(token), 503);
    tenant.answerJwks = undefined;
    pass(6_000);
    assert.equal(await statusOf(token), 200);
    pass(6 * MINUTE);
  }
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
  const warnings = () => log.filter((line) => line.includes("the known keys serve")).length;

  pass(6 * MINUTE);
  assert.equal(await statusOf(await signed()), 200);
  assert.equal(warnings(), 1);
  assert.match(log.join(""), new RegExp(`${tenant.issuer}\\.well-known/jwks\\.json.*: the known keys`));
  for (let n = 0; n < 5; n++) {
    pass(10_000);
    assert.equal(await statusOf(await signed()), 200);
  }
  assert.equal(warnings(), 1);

  pass(53 * MINUTE);
  assert.equal(await statusOf(await signed()), 200);
  assert.equal(warnings(), 2);

  pass(MINUTE);
  assert.equal(await statusOf(await signed()), 503);
  tenant.answerJwks = undefined;
  assert.equal(await statusOf(await signed()), 200);
});

for (const [fault, answer] of Object.entries(FAULTS)) {
  test(`with a key, ${fault} from Auth0 changes nothing`, async (t) => {
    logOf(t);
    const pass = stopClock(t);
    const token = await signed();
    assert.equal(await statusOf(token), 200);
    tenant.answerJwks = answer;
    for (let n = 0; n < 3; n++) {
      pass(6 * MINUTE);
      assert.equal(await statusOf(token), 200);
    }
  });
}

test("in an outage callers wait for Auth0 once a minute at most", async (t) => {
  logOf(t);
  const pass = stopClock(t);
  assert.equal(await statusOf(await signed()), 200);
  tenant.answerJwks = fail;
  pass(6 * MINUTE);
  const before = tenant.jwksRequests;
  for (let n = 0; n < 10; n++) {
    assert.equal(await statusOf(await signed()), 200);
    pass(5_000);
  }
  assert.equal(tenant.jwksRequests - before, 1);
});

test("fresh keys are taken as soon as they can be had", async (t) => {
  logOf(t);
  const pass = stopClock(t);
  const old = await signed();
  assert.equal(await statusOf(old), 200);
  tenant.answerJwks = fail;
  pass(6 * MINUTE);
  assert.equal(await statusOf(old), 200);

  await tenant.rotateKeys({ withdraw: true });
  tenant.answerJwks = undefined;
  pass(2_000);
  assert.equal(await statusOf(await signed()), 200, "signed with the new key");
  pass(MINUTE);
  assert.equal(await statusOf(old), 401, "signed with the withdrawn one");
});

test("keys are read again every five minutes while calls come in, and not more often", async (t) => {
  const pass = stopClock(t);
  const before = tenant.jwksRequests;
  for (let minute = 0; minute < 60; minute++) {
    assert.equal(await statusOf(await signed()), 200);
    pass(MINUTE);
  }
  assert.equal(tenant.jwksRequests - before, 12);
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

test("a withdrawn key is refused by the first call after an idle time", async (t) => {
  const pass = stopClock(t);
  const token = await signed();
  assert.equal(await statusOf(token), 200);
  await tenant.rotateKeys({ withdraw: true });
  pass(10 * MINUTE);
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

test("a flood of made-up keys is a handful of requests to Auth0", async (t) => {
  const pass = stopClock(t);
  assert.equal(await statusOf(await signed()), 200);
  const before = tenant.jwksRequests;
  for (let n = 0; n < 100; n++) {
    const token = await tenant.sign({ aud: server.url }, { header: { kid: `made-up-${n}` } });
    assert.equal(await statusOf(token), 401);
    pass(200);
  }
  assert.ok(tenant.jwksRequests - before <= 4, `${tenant.jwksRequests - before} in twenty seconds`);
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
  const resource = { issuer: tenant.issuer, url: server.url, name: "Tasks", scopes: [] };
  const authenticate = createAuthenticator(resource, () => {});
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

  for (let n = 2; n < 10_002; n += 100) {
    await Promise.all(Array.from({ length: 100 }, (_, m) => authenticate(token(n + m))));
  }
  assert.equal(await isVerified(token(10_001)), false);
  assert.equal(await isVerified(token(0)), true, "the oldest have made room");
});
